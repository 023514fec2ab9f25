"""A fine-tuned checkpoint in other libraries: their [CLS] vectors are ours, and texts are cut alike."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_twins import pack, paper_tasks, small_config
from sentence_transformers import SentenceTransformer
from small_tokenizer import small_tokenizer
from transformers import AutoModel, AutoTokenizer, BertForPreTraining, BertModel

from mtfast.data.tokens import assemble_singles, tokenize_texts
from mtfast.models.bert import PackedBert
from mtfast.models.checkpoint import (
    CheckpointError,
    load_bert_config,
    load_pretrained,
    load_tasks,
    load_tokenizer,
    save_pretrained,
)
from mtfast.models.multitask import build_multitask_model
from mtfast.models.sentence_files import max_length_of
from mtfast.tasks import MlpConfig

MAX_LENGTH = 24
SENTENCES = [
    "Good!",
    "a",
    "the film is not bad .",
    "The playing was good; the play was not good, was it?",
    "a film " * 30,  # cut
    "bad " * 22,  # as long as may be
    "good " * 23,  # cut by one
    "",
]


@pytest.fixture(scope="module", params=["encoder", "pooler", "pooler and MLM head"])
def source(request, tmp_path_factory) -> Path:
    """A checkpoint to start from: the real one for the encoder with its pooler, where there is one."""
    real = os.environ.get("MTFAST_TEST_CHECKPOINT")
    if request.param == "pooler" and real:
        return Path(real)
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(3)
    if request.param == "pooler and MLM head":
        model = BertForPreTraining(small_config())
    else:
        model = BertModel(small_config(), add_pooling_layer=request.param == "pooler")
    for name, tensor in model.named_parameters():  # as far from the initial values as trained ones
        if "LayerNorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.3)
    model.save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "best-mean"
    config = load_bert_config(source)
    model = build_multitask_model(config, paper_tasks(), MlpConfig(48), 0.1)
    report = load_pretrained(source, model)
    save_pretrained(
        directory,
        model.state_dict(),
        config,
        load_tokenizer(source),
        tasks=paper_tasks(),
        mlp=MlpConfig(48),
        max_length=MAX_LENGTH,
        carried=report.carried,
    )
    return directory


def ours(directory: Path) -> torch.Tensor:
    bert = PackedBert(load_bert_config(directory)).eval()
    load_pretrained(directory, bert)
    sequences = assemble_singles(
        tokenize_texts(load_tokenizer(directory), SENTENCES), max_length_of(directory)
    )
    runs = np.split(sequences.tokens, sequences.offsets[1:-1])
    with torch.no_grad():
        return bert(**pack([run.tolist() for run in runs]), cls_only=True)


def test_cls_vectors_are_the_same_everywhere(saved):
    expected = ours(saved)
    assert expected.std() > 0.1
    bert, tokenizer = AutoModel.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer(SENTENCES, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        of_transformers = bert(**inputs).last_hidden_state[:, 0]
    assert torch.allclose(of_transformers, expected, atol=1e-5)

    model = SentenceTransformer(str(saved), device="cpu")
    assert model.max_seq_length == MAX_LENGTH
    vectors = model.encode(SENTENCES, batch_size=3, convert_to_tensor=True)
    assert vectors.dtype == torch.float32 and torch.allclose(vectors, expected, atol=1e-5)


def test_the_weights_are_those_of_the_checkpoint(saved, source):
    """Under whatever names: a checkpoint with pre-training heads prefixes its encoder's."""
    found, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not {name for name in info["missing_keys"] if "pooler" not in name}
    expected = AutoModel.from_pretrained(source).state_dict()
    for name, tensor in found.state_dict().items():
        assert "pooler" in name or torch.equal(tensor, expected[name]), name


def test_the_checkpoint_stays_one_of_ours(saved):
    assert set(load_tasks(saved)[0]) == {"sst", "quora", "sts"}
    assert max_length_of(saved) == MAX_LENGTH
    (pooling,) = (path for path in saved.iterdir() if path.is_dir())
    assert pooling.name == "1_Pooling"


def test_the_length_of_a_checkpoint_without_one_is_its_positions(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert max_length_of(tmp_path) == 512
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": null, "do_lower_case": false}')
    assert max_length_of(str(tmp_path)) == 512


def test_the_length_is_found_below_modules_json(tmp_path):
    small_config().save_pretrained(tmp_path / "0_Transformer")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 100}')
    assert max_length_of(tmp_path) == 100


@pytest.mark.parametrize("limit", ['"long"', "0", "true", "513", "7", "[1]"])
def test_a_length_that_cannot_be_is_named(tmp_path, limit):
    small_config().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {limit}}}')
    with pytest.raises(CheckpointError, match=r"max_seq_length is .*; it should be a number from 8 to 512"):
        max_length_of(tmp_path)


def test_the_length_of_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        max_length_of(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        max_length_of(tmp_path)
