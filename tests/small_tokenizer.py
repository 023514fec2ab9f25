"""A word-piece tokenizer of a few words, so that tests of the data need no checkpoint."""

from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "film", "##s", "good", "bad", "play", "##ing", "##ed", "is", "was", "not", ".", "!", "?"]
LETTERS = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for prefix in ("", "##")]


def small_tokenizer(extra_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Lower-casing word pieces: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4; any word of a-z and 0-9."""
    pieces = dict.fromkeys([*SPECIAL, *WORDS, *LETTERS, *extra_words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return PreTrainedTokenizerFast(
        tokenizer_object=BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)._tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=512,
    )
