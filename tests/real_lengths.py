"""How many word pieces of BERT's uncased vocabulary real inputs have, in file order, with [CLS] and [SEP]."""

SST = (18, 18, 28, 10, 26, 17, 11, 45, 41, 34, 37, 35, 33, 35, 18, 27, 44, 23, 36, 40)  # dev sentences
QUORA = (14, 16, 17, 13, 12, 17, 13, 8, 16, 12, 16, 11, 13, 36, 20, 12, 19, 8, 10, 9)  # dev, first questions
STS = (11, 11, 14, 9, 10, 10, 10, 11, 26, 24, 13, 20, 11, 9, 36, 7, 8, 30, 8, 10)  # dev, first sentences
IMDB = (212, 178, 350, 232, 212, 512, 445, 273, 277, 512)  # test reviews, cut at 512
REAL_LENGTHS = SST + QUORA + STS + IMDB
