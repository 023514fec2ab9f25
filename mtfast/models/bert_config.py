"""The config of a checkpoint's encoder, where that is a BERT."""

import os

from transformers import BertConfig

from mtfast.models.bert import check_config
from mtfast.models.files import CheckpointError, read_json
from mtfast.models.locate import find_file, locate

_SUPPORTED = "mtfast reads BERT encoders (model_type 'bert') with absolute positions"


def load_bert_config(name_or_path: str | os.PathLike[str]) -> BertConfig:
    """The config of a BERT checkpoint: a directory (also a sentence-transformers one) or a Hugging Face name.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another architecture, which is named.
    """
    source, subfolder = locate(name_or_path)
    file = find_file(source, subfolder, "config.json")
    if file is None:
        raise CheckpointError(f"{name_or_path} has no config.json: it is not a Hugging Face checkpoint")
    fields = read_json(file, dict)
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    named_bert = model_type == "bert" or (
        model_type is None and architectures and all(str(name).startswith("Bert") for name in architectures)
    )
    if not named_bert:
        raise CheckpointError(
            f"{name_or_path} is a checkpoint of another architecture: model_type {model_type!r}, "
            f"architectures {architectures}; {_SUPPORTED}"
        )
    try:
        config = BertConfig.from_dict(fields)
        position_type = fields.get("position_embedding_type", "absolute")
        if position_type != "absolute":
            raise ValueError(f"position_embedding_type is {position_type!r}; only 'absolute' is supported")
        check_config(config)
    except Exception as error:  # transformers' strict configs raise several kinds
        raise CheckpointError(f"{name_or_path}: {error}; {_SUPPORTED}") from error
    return config
