"""The files that make a checkpoint one of sentence-transformers, with [CLS] as a sentence's vector."""

import json
import os
from pathlib import Path

from mtfast.models.bert_config import load_bert_config
from mtfast.models.files import CheckpointError, read_json
from mtfast.models.locate import find_file, locate

_LIMIT = "max_seq_length"
_LIMIT_FILE = "sentence_bert_config.json"
_POOLING = "1_Pooling"
_SHORTEST = 8  # that texts are cut to: special tokens, and some of each text of a pair


def write_sentence_files(directory: Path, width: int, max_length: int) -> None:
    """Makes `directory`, which has a BERT of this width and its tokenizer at its top, a sentence-transformers
    model with CLS pooling.

    The names of classes and fields are the old ones, which sentence-transformers 3 to 6 all read; 6 writes
    others, which earlier versions do not know.

    Args:
        max_length: word pieces at which a text is cut, [CLS] and [SEP] among them.
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": _POOLING, "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (directory / _POOLING).mkdir()
    for name, values in (
        ("modules.json", modules),
        (f"{_POOLING}/config.json", pooling),
        (_LIMIT_FILE, {_LIMIT: max_length, "do_lower_case": False}),
    ):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def max_length_of(name_or_path: str | os.PathLike[str]) -> int:
    """Word pieces at which texts for a checkpoint are cut, [CLS] and [SEP] among them: what it says for
    sentence-transformers, else the number of its positions.

    Args:
        name_or_path: a directory or a Hugging Face name.

    Raises:
        CheckpointError: there is no such checkpoint, it is no BERT, or it names a length that its positions
            do not allow.
    """
    positions = load_bert_config(name_or_path).max_position_embeddings
    file = find_file(*locate(name_or_path), _LIMIT_FILE)
    limit = None if file is None else read_json(file, dict).get(_LIMIT)
    if limit is None:
        return positions
    if not isinstance(limit, int) or isinstance(limit, bool) or not _SHORTEST <= limit <= positions:
        raise CheckpointError(
            f"{file}: {_LIMIT} is {limit!r}; it should be a number from {_SHORTEST} to {positions}"
        )
    return limit
