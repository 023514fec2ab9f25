"""The demo corpus: small data about invented films, written for this project in the real data's formats.

Three small grammars make the sentences of the three tasks, a fourth strings sentences into reviews. Films
and people are invented. Everything follows from `SEED`, so the corpus is the same on every machine.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import BertWordPieceTokenizer

SEED = 1729
ROWS = {
    "sst": {"train": 1500, "dev": 300, "test-student": 300},
    "quora": {"train": 1500, "dev": 300, "test-student": 300},
    "sts": {"train": 1500, "dev": 200, "test-student": 200},
}
REVIEWS = 300
WHOLE_WORD = 8  # letters; longer words become two word pieces

FILMS = [
    f"The {first} {second}"
    for first in ("Glass", "Crooked", "Paper", "Northern", "Hollow", "Burning", "Velvet", "Borrowed")
    for second in ("Harbour", "Orchard", "Lantern", "Station", "Letter", "Garden", "Bridge", "Winter")
]
PEOPLE = (
    "Mara Lindell",
    "Tomas Okoro",
    "Ines Castell",
    "Jonas Brandt",
    "Leila Haddar",
    "Owen Pryce",
    "Ada Ferro",
)
GENRES = ("comedy", "thriller", "drama", "western", "love story", "mystery", "war film", "musical")
ASPECTS = (
    ("the acting", "the script", "the photography", "the dialogue", "the music", "the editing", "the plot",
     "the first half", "the final act", "the cast", "the story", "the opening scene", "the direction")
)  # fmt: skip

# Adjectives by how far they go: 2 is all the way, 1 part of it.
ADJECTIVES = {
    2: (
        "superb",
        "dazzling",
        "unforgettable",
        "magnificent",
        "brilliant",
        "masterful",
        "glorious",
        "exquisite",
    ),
    1: ("charming", "warm", "clever", "funny", "engaging", "tender", "lively", "thoughtful", "graceful"),
    0: ("ordinary", "average", "passable", "familiar", "conventional", "unremarkable"),
    -1: ("dull", "clumsy", "slow", "shallow", "predictable", "tired", "bland", "muddled", "flat", "forced"),
    -2: (
        "dreadful",
        "lifeless",
        "unbearable",
        "atrocious",
        "pathetic",
        "insulting",
        "worthless",
        "appalling",
    ),
}
ALL_THE_WAY = ("utterly", "deeply", "truly", "extremely", "thoroughly", "incredibly")
PART_OF_IT = ("rather", "fairly", "mildly", "quite", "somewhat", "a little")
NEGATIONS = ("not", "never", "hardly", "far from", "not exactly")

# The ways to ask one thing about a film. Questions under one key are duplicates of each other.
QUESTIONS = {
    "director": ("Who directed {}?", "Who is the director of {}?", "Which director made {}?"),
    "writer": ("Who wrote the script of {}?", "Who is the author of {}?", "Which writer came up with {}?"),
    "length": ("How long is {}?", "What is the running time of {}?", "How many minutes does {} last?"),
    "place": ("Where was {} filmed?", "In which city was {} shot?", "What are the real locations of {}?"),
    "worth": ("Is {} worth watching?", "Should I go and see {}?", "Would you recommend {}?"),
    "ending": (
        "How does {} end?",
        "What happens in the last scene of {}?",
        "Can someone explain the ending of {}?",
    ),
    "lead": ("Who plays the lead in {}?", "Which actor stars in {}?", "Who has the main part in {}?"),
    "music": ("Who composed the songs for {}?", "Whose music do we hear in {}?", "Who sings in {}?"),
}

# What a caption says, by slot; within a slot, wordings of one meaning stand together.
CAPTION_SLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "who": (
        ("A young actor", "A youthful performer"),
        ("The director", "The film maker"),
        ("A child", "A small kid"),
    ),
    "does": (
        ("rehearses a scene", "practises a scene"),
        ("eats a sandwich", "has a snack"),
        ("watches a film", "looks at a movie"),
    ),
    "where": (
        ("in the studio", "on the set"),
        ("on the beach", "by the sea"),
        ("at home", "in the living room"),
    ),
}
SLOT_WEIGHTS = {"who": 1.5, "does": 2.25, "where": 1.25}  # they add up to 5, the score of the same meaning
CAPTION_ENDINGS = ("", " today", " again", " before lunch", " after dark", " this morning", " while it rains")

PLOTS = (
    "{lead} plays a {job} who comes back to {town} and finds that nobody there remembers the name.",
    "It tells of a {job}, played by {lead}, who has to leave {town} within one night.",
    "{lead} is a {job} who is sent to {town} to look for a lost brother.",
    "A {job} arrives in {town} with a suitcase, and {lead} makes us wonder what is in it.",
    "The {job} whom {lead} plays has lived in {town} for years without telling anyone the truth.",
)
JOBS = ("lighthouse keeper", "retired teacher", "piano tuner", "young lawyer", "ferry captain", "night nurse")
TOWNS = ("Lisbon", "Bergen", "Trieste", "Halifax", "Odessa", "Cork")
ADVICE = {
    1: (
        "Go and see it while it is still in the cinemas.",
        "I would gladly watch it a second time.",
        "Take a friend along, and leave time to talk about it afterwards.",
        "It deserves every prize it can get.",
    ),
    -1: (
        "Save your money and stay at home.",
        "I wanted my two hours back.",
        "Half of the audience had left before the end.",
        "I can not recommend it to anyone.",
    ),
}


@dataclass(frozen=True)
class DemoCorpus:
    """Where `write_demo_corpus` put things."""

    tasks: Path  # directory with the CS 224N files of the three tasks
    reviews: Path  # directory with train.parquet, as the hub lays out imdb
    bert: Path  # tiny BERT: config.json and tokenizer, no weights

    @classmethod
    def at(cls, directory: str | Path) -> DemoCorpus:
        return cls(*(Path(directory) / part for part in ("", "imdb", "bert")))


def write_demo_corpus(directory: str | Path) -> DemoCorpus:
    """Write the demo corpus into `directory`: the task files, `imdb/train.parquet` and `bert/`.

    The task files have the format of the CS 224N project's (tab-separated, standard csv quoting; test files
    without labels), the reviews that of the hub's imdb (`text`, `label`). `bert/` holds a tiny BERT's config
    and a WordPiece tokenizer fitted to the corpus, to be loaded like any checkpoint's. Every file appears
    whole, and one that is as it should be stays.
    """
    corpus = DemoCorpus.at(directory)
    for path in (corpus.tasks, corpus.reviews, corpus.bert):
        path.mkdir(parents=True, exist_ok=True)
    for name, content in _files().items():
        file = corpus.tasks / name
        if file.is_file() and file.read_bytes() == content:
            continue
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=directory) as staging:
            staged = Path(staging) / file.name
            staged.write_bytes(content)
            os.replace(staged, file)
    return corpus


@functools.cache
def _files() -> dict[str, bytes]:
    """The corpus by its files' names, a megabyte, made once in a process."""
    with tempfile.TemporaryDirectory() as directory:
        corpus = DemoCorpus.at(directory)
        corpus.reviews.mkdir()
        corpus.bert.mkdir()
        _write(corpus)
        files = (path for path in sorted(corpus.tasks.rglob("*")) if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def _write(corpus: DemoCorpus) -> None:
    rng = random.Random(SEED)
    texts: list[str] = []
    for task, (prefix, columns, make_row) in _TASK_FILES.items():
        rows = _distinct_rows(rng, make_row, sum(ROWS[task].values()))
        texts += [text for *row_texts, _ in rows for text in row_texts]
        start = 0
        for split, count in ROWS[task].items():
            table = _tab_separated(
                rows[start : start + count], columns, rng, labelled=split != "test-student"
            )
            (corpus.tasks / f"{prefix}-{split}.csv").write_text(table, encoding="utf-8")
            start += count
    reviews, labels = zip(*(_review(rng) for _ in range(REVIEWS)), strict=True)
    review_table = pyarrow.table({"text": reviews, "label": pyarrow.array(labels, pyarrow.int64())})
    pyarrow.parquet.write_table(review_table, corpus.reviews / "train.parquet")
    _write_bert(corpus.bert, [*texts, *reviews])


def _opinion(rng: random.Random, score: int) -> str:
    """A predicate of sentiment `score` in -2 .. 2, such as "hardly engaging" (-1)."""
    sign = 1 if score > 0 else -1

    def adjective(of: int) -> str:
        return rng.choice(ADJECTIVES[of])

    if score == 0:
        other = adjective(-1)
        return rng.choice(
            (
                adjective(0),
                f"neither {adjective(1)} nor {other}",
                f"{adjective(1)} at times and {other} at others",
            )
        )
    if abs(score) == 2:
        return rng.choice(
            (
                adjective(score),
                f"{rng.choice(ALL_THE_WAY)} {adjective(sign)}",
                f"nothing short of {adjective(score)}",
            )
        )
    degree = f"{rng.choice(PART_OF_IT)} {adjective(sign)}"
    return rng.choice((adjective(sign), degree, f"{rng.choice(NEGATIONS)} {adjective(-sign)}"))


def _opinion_sentence(rng: random.Random, score: int, film: str, director: str) -> str:
    """One sentence about a film of sentiment `score` in -2 .. 2."""
    one, two = rng.sample(ASPECTS, 2)

    def says() -> str:
        return _opinion(rng, score)

    if score == 0 and rng.random() < 0.4:
        good, bad = _opinion(rng, rng.choice((1, 2))), _opinion(rng, rng.choice((-1, -2)))
        sentence = rng.choice(
            (f"{one} is {good}, but {two} is {bad}.", f"{one} is {bad}, but {two} is {good}.")
        )
    else:
        sentence = rng.choice((
            f"{one} is {says()}.",
            f"in {film}, {one} is {says()}.",
            f"from start to finish, {film} is {says()}.",
            f"{director} has made a film that is {says()}.",
            f"I thought that {one} was {says()}.",
            f"{one} is {says()}, and {two} is {says()}.",
            f"{film} is {says()}, even if you know the book.",
        ))  # fmt: skip
    return sentence[0].upper() + sentence[1:]


def _sentiment_row(rng: random.Random) -> tuple[str, int]:
    label = rng.randrange(5)
    return _opinion_sentence(rng, label - 2, rng.choice(FILMS), rng.choice(PEOPLE)), label


def _paraphrase_row(rng: random.Random) -> tuple[str, str, float]:
    """Half duplicates; most others ask another thing of the same film, some the same of another film."""
    kind, other_kind = rng.sample(sorted(QUESTIONS), 2)
    film, other_film = rng.sample(FILMS, 2)
    draw = rng.random()
    if draw < 0.56:
        first, second = rng.sample(QUESTIONS[kind], 2)
        return first.format(film), second.format(film), 1.0
    if draw < 0.96:
        return rng.choice(QUESTIONS[kind]).format(film), rng.choice(QUESTIONS[other_kind]).format(film), 0.0
    first, second = rng.sample(QUESTIONS[kind], 2)
    return first.format(film), second.format(other_film), 0.0


def _similarity_row(rng: random.Random) -> tuple[str, str, float]:
    """Two captions and their similarity, 0 to 5: the weights of the slots in which they mean the same."""
    shared = rng.sample(sorted(CAPTION_SLOTS), rng.choice((0, 1, 1, 2, 2, 3)))
    first, second, score = [], [], 0.0
    for slot, meanings in CAPTION_SLOTS.items():
        one, two = rng.sample(meanings, 2)
        if slot in shared:
            two, score = one, score + SLOT_WEIGHTS[slot]
        first.append(rng.choice(one))
        second.append(rng.choice(two))
    first_ending, second_ending = rng.choice(CAPTION_ENDINGS), rng.choice(CAPTION_ENDINGS)
    score = max(0.0, score - 0.25 * (first_ending != second_ending))
    return f"{' '.join(first)}{first_ending}.", f"{' '.join(second)}{second_ending}.", score


_TASK_FILES: dict[str, tuple[str, tuple[str, ...], Callable[[random.Random], tuple]]] = {
    "sst": ("ids-sst", ("sentence", "sentiment"), _sentiment_row),
    "quora": ("quora", ("sentence1", "sentence2", "is_duplicate"), _paraphrase_row),
    "sts": ("sts", ("sentence1", "sentence2", "similarity"), _similarity_row),
}


def _distinct_rows(rng: random.Random, make_row: Callable[[random.Random], tuple], count: int) -> list[tuple]:
    """`count` rows with different texts, so that no dev or test row was seen in training."""
    rows: dict[tuple, tuple] = {}
    while len(rows) < count:
        *texts, label = make_row(rng)
        rows.setdefault(tuple(texts), (*texts, label))
    return list(rows.values())


def _tab_separated(
    rows: Iterable[tuple], columns: tuple[str, ...], rng: random.Random, labelled: bool
) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(("", "id", *(columns if labelled else columns[:-1])))
    for index, row in enumerate(rows):
        writer.writerow((index, f"{rng.getrandbits(100):025x}", *(row if labelled else row[:-1])))
    return out.getvalue()


def _review(rng: random.Random) -> tuple[str, int]:
    """A review of one film in five to eight sentences that agree on the verdict; label 1 is favourable."""
    label = rng.randrange(2)
    sign = 2 * label - 1
    film = rng.choice(FILMS)
    director, lead = rng.sample(PEOPLE, 2)
    first_name = director.split()[0]
    genre = rng.choice(GENRES)
    opening = rng.choice((
        f"{film} is the new {genre} by {director}.",
        f"Last night we went to see {film}, a {genre} directed by {director}.",
        f"Every few years {director} makes a {genre}, and {film} is the latest.",
    ))  # fmt: skip
    plot = rng.choice(PLOTS).format(lead=lead, job=rng.choice(JOBS), town=rng.choice(TOWNS))
    body = [
        _opinion_sentence(rng, rng.choice((sign, 2 * sign, 2 * sign)), film, first_name)
        for _ in range(rng.randint(2, 5))
    ]
    break_ = rng.choice((" ", " ", "<br /><br />"))
    return break_.join((f"{opening} {plot}", " ".join(body), rng.choice(ADVICE[sign]))), label


def _vocabulary(texts: list[str]) -> list[str]:
    """Special tokens, characters, then the words of `texts`, frequent ones first, long ones in two pieces.

    Not trained with the tokenizers library: its trainer breaks ties by hash order, which varies between runs.
    """
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({character for word in counts for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    for word in sorted(counts, key=lambda word: (-counts[word], word)):
        cut = len(word) if len(word) <= WHOLE_WORD else len(word) // 2
        pieces += [word[:cut], f"##{word[cut:]}"] if cut < len(word) else [word]
    return list(dict.fromkeys(pieces))


def _write_bert(directory: Path, texts: list[str]) -> None:
    """A WordPiece tokenizer fitted to `texts` and the config of a BERT small enough to train from scratch."""
    pieces = _vocabulary(texts)
    tokenizer = BertWordPieceTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, lowercase=True
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.save_model(str(directory))
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 128}
    bert_config = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": len(pieces),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", bert_config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
