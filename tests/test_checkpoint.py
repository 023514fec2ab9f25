"""Checkpoints against Hugging Face's own reading and writing of them."""

import json
import resource
import shutil

import pytest
import torch
import transformers
from bert_twins import paper_tasks, small_config
from safetensors.torch import load_file, save_file
from small_tokenizer import small_tokenizer
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizerFast

from mtfast.models import files
from mtfast.models.checkpoint import (
    CheckpointError,
    load_bert_config,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from mtfast.models.multitask import MultiTaskModel, build_multitask_model
from mtfast.models.pretraining import build_pretrain_model
from mtfast.tasks import MlpConfig

HEADS = {"tasks": paper_tasks(), "mlp": MlpConfig(48)}
WITH_HEADS = HEADS | {"max_length": 32}


def with_heads(config: BertConfig) -> MultiTaskModel:
    return build_multitask_model(config, **HEADS, dropout_p=0.1)


def tensors_of(directory) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        if file.name != "heads.safetensors":
            tensors |= load_file(file)
    for file in directory.glob("*.bin"):
        tensors |= torch.load(file)
    return tensors


def files_of(directory) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def legacy_names(tensors):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(name): x for name, x in tensors.items()}


def hugging_face_checkpoint(directory, kind: str):
    """A randomly initialised checkpoint as Hugging Face writes it: `kind` says how."""
    torch.manual_seed(1)
    if kind == "BertModel" or kind.startswith("sentence-transformers"):
        source = BertModel(small_config())
    else:
        source = BertForPreTraining(small_config())
    folder = directory / "0_Transformer" if kind.endswith("subfolder") else directory
    if kind == "sharded":
        source.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    else:
        source.save_pretrained(folder)
    if kind.startswith("sentence-transformers"):
        modules = [{"type": "sentence_transformers.models.Transformer", "path": folder.name}]
        modules[0]["path"] = "" if folder == directory else folder.name
        (directory / "modules.json").write_text(json.dumps(modules))
    file = folder / "model.safetensors"
    if kind == "legacy":
        tensors = legacy_names(load_file(file))
        tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
        save_file(tensors, file)
    if kind == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    return source.state_dict(), folder


KINDS = [
    "BertForPreTraining",
    "BertModel",
    "sentence-transformers",
    "sentence-transformers subfolder",
    "legacy",
    "bin",
    "sharded",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_load_and_save_keep_every_bit(tmp_path, kind, stage):
    source, folder = hugging_face_checkpoint(tmp_path / "source", kind)
    config = load_bert_config(tmp_path / "source")
    model = (build_pretrain_model if stage == "pretrain" else with_heads)(config)
    report = load_pretrained(tmp_path / "source", model)
    assert not report.ignored
    target = tmp_path / "deep" / "target"
    heads = WITH_HEADS if stage == "finetune" else {}
    save_pretrained(target, model.state_dict(), config, None, **heads, carried=report.carried)

    saved = tensors_of(target)
    for name, tensor in source.items():
        if "decoder" in name:  # tied: Hugging Face leaves it out too
            continue
        name = name if name in saved else f"bert.{name}"
        assert torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype, name
    if kind == "legacy":
        assert torch.equal(saved["bert.embeddings.position_ids"], torch.arange(512)[None])
    elif stage == "finetune":
        assert set(saved) == {name for name in tensors_of(folder) if "decoder" not in name}

    has_heads = "cls.predictions.bias" in source
    for twin_class in (BertModel, BertForPreTraining):
        twin, info = twin_class.from_pretrained(target, output_loading_info=True)
        if twin_class is BertModel or has_heads or stage == "pretrain":
            assert not info["missing_keys"]
        for name, tensor in twin.state_dict().items():
            expected = source.get(name, source.get(name.removeprefix("bert."), source.get(f"bert.{name}")))
            assert expected is None or torch.equal(tensor, expected), name
    fresh = {name.split(".")[0] for name in report.initialised}
    assert fresh == ({"heads"} if stage == "finetune" else set() if has_heads else {"mlm", "nsp"})


def test_real_checkpoint_keeps_every_bit(tmp_path, checkpoint_dir):
    config = load_bert_config(checkpoint_dir)
    model = with_heads(config)
    report = load_pretrained(checkpoint_dir, model)
    tokenizer = load_tokenizer(checkpoint_dir)
    save_pretrained(
        tmp_path / "saved", model.state_dict(), config, tokenizer, **WITH_HEADS, carried=report.carried
    )
    source, saved = tensors_of(checkpoint_dir), tensors_of(tmp_path / "saved")
    assert set(saved) == set(source)
    assert all(torch.equal(saved[name], x) and saved[name].dtype == x.dtype for name, x in source.items())
    twin, original = BertModel.from_pretrained(tmp_path / "saved"), BertModel.from_pretrained(checkpoint_dir)
    again = load_tokenizer(tmp_path / "saved")
    text = "A film of rare, un-hurried beauty."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    inputs = again(text, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(twin(**inputs).pooler_output, original(**inputs).pooler_output)


def test_pretrained_heads_reach_the_saved_fine_tuned_checkpoint(tmp_path):
    config = small_config()
    first = build_pretrain_model(config)
    torch.nn.init.normal_(first.mlm.bias)
    save_pretrained(tmp_path / "a", first.state_dict(), config, None)
    second = with_heads(config)
    report = load_pretrained(tmp_path / "a", second)
    save_pretrained(tmp_path / "b", second.state_dict(), config, None, **WITH_HEADS, carried=report.carried)
    third = build_pretrain_model(config)
    assert not load_pretrained(tmp_path / "b", third).initialised
    for (name, a), (_, b) in zip(first.named_parameters(), third.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert third.mlm.decoder_weight is third.encoder.embeddings.word


def test_half_precision_checkpoint_opens_in_its_dtype(tmp_path):
    config = small_config()
    model = build_pretrain_model(config).to(torch.bfloat16)
    save_pretrained(tmp_path / "saved", model.state_dict(), config, None)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = build_pretrain_model(config)
    load_pretrained(tmp_path / "saved", wide)
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "config, named",
    [
        (transformers.RobertaConfig(architectures=["RobertaForMaskedLM"]), "'roberta'.*RobertaForMaskedLM"),
        (transformers.DistilBertConfig(), "'distilbert'"),
        (transformers.GPT2Config(), "'gpt2'"),
        (small_config(is_decoder=True), "is_decoder"),
        (small_config(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
        (small_config(hidden_size=514), "head_dim 257"),
        (small_config(hidden_act="swoosh"), "swoosh"),
    ],
)
def test_another_architecture_is_named(tmp_path, config, named):
    config.save_pretrained(tmp_path)
    for load in (load_bert_config, lambda path: load_pretrained(path, build_pretrain_model(small_config()))):
        with pytest.raises(CheckpointError, match=f"(?s){named}.*BERT encoder"):
            load(tmp_path)


def test_what_is_missing_or_torn_is_named(tmp_path):
    model = with_heads(small_config())
    for path, text in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no config.json")):
        with pytest.raises(CheckpointError, match=text):
            load_pretrained(path, model)
    _, folder = hugging_face_checkpoint(tmp_path / "source", "BertModel")
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def fails(match):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(folder, model)

    save_file({k: v for k, v in tensors.items() if "layer.1.attention.self.key" not in k}, file)
    fails(r"lacks weights.*encoder\.layers\.1\.attention\.qkv\.weight")
    save_file(tensors | {"embeddings.position_embeddings.weight": torch.zeros(128, 64)}, file)
    fails(r"encoder.embeddings.position is \[128, 64\], the model's is \[512, 64\]")
    save_file(tensors | {"cls.predictions.decoder.weight": torch.zeros(211, 64)}, file)
    fails("untied decoder")
    file.write_bytes(file.read_bytes()[:1000])
    fails("model.safetensors is torn")
    file.unlink()
    fails("neither model.safetensors nor pytorch_model.bin")
    (folder / "config.json").write_text("{")
    fails("config.json is not valid JSON")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(folder)


def test_files_of_a_wrong_shape_are_named(tmp_path, monkeypatch):
    model = with_heads(small_config())
    _, folder = hugging_face_checkpoint(tmp_path / "source", "BertModel")
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, text = load_file(weights), config.read_text()

    def fails(match):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(folder, model)

    (folder / "mtfast.json").write_text("3")
    fails(r"mtfast\.json should hold an object, not 3")
    (folder / "mtfast.json").unlink()
    config.write_text("[1]")
    fails(r"config\.json should hold an object, not \[1\]")
    config.unlink()
    for modules, match in (
        ("{}", "should hold a list, not {}"),
        ('["x"]', "should list modules"),
        ("3", "not 3"),
    ):
        (folder / "modules.json").write_text(modules)
        fails(rf"modules\.json .*{match}")
    (folder / "modules.json").unlink()
    config.write_text(text)

    weights.unlink()
    for index in ("[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        fails(r"model\.safetensors\.index\.json ")
    (folder / "model.safetensors.index.json").unlink()
    for value in (["a"], {"embeddings": {"word": torch.zeros(2)}}):
        torch.save(value, folder / "pytorch_model.bin")
        fails(r"pytorch_model\.bin should hold tensors by name")
    weights.mkdir()
    fails(r"model\.safetensors is a directory; it should be a file")
    weights.rmdir()
    save_file(tensors, weights)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "load_file", forbidden)
    fails(r"model\.safetensors cannot be read: Permission denied")


def test_weights_that_are_not_finite_are_named_when_they_are_loaded(tmp_path):
    model = with_heads(small_config())
    _, folder = hugging_face_checkpoint(tmp_path / "source", "BertForPreTraining")
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"][0] = torch.nan  # of no use to this model
    save_file(tensors, folder / "model.safetensors")
    load_pretrained(folder, model)
    tensors["bert.embeddings.LayerNorm.bias"][:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"source: 2 of the 64 values of encoder\.\S*norm\S* are not finite"
    ):
        load_pretrained(folder, model)


def test_tensors_of_no_bert_are_ignored_and_reported(tmp_path):
    _, folder = hugging_face_checkpoint(tmp_path / "source", "BertModel")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"classifier.weight": torch.zeros(2, 64)}, folder / "model.safetensors")
    report = load_pretrained(folder, with_heads(small_config()))
    assert report.ignored == ("classifier.weight",)
    assert set(report.carried) == {"nsp.pooler.weight", "nsp.pooler.bias"}
    for part in ("freshly initialised: heads.task-sst, heads.mlp-pair", "nsp.pooler", "classifier.weight"):
        assert part in report.summary()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config, target = small_config(), tmp_path / "saved"
    first, second = with_heads(config), with_heads(config)
    save_pretrained(target, first.state_dict(), config, None, **WITH_HEADS)

    def is_first():
        again = with_heads(config)
        load_pretrained(target, again)
        return torch.equal(again.encoder.embeddings.word, first.encoder.embeddings.word)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(target, second.state_dict(), config, None, **WITH_HEADS)
    assert is_first() and [path.name for path in tmp_path.iterdir()] == ["saved"]
    monkeypatch.undo()
    # Between the two renames that replace a directory the old one lies beside it.
    shutil.move(target, tmp_path / ".saved.outgoing")
    assert is_first()
    save_pretrained(target, second.state_dict(), config, None, **WITH_HEADS)
    assert not is_first()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(("size", "file"), [(20_000, "weights"), (1_000, "tokenizer")])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path, size, file):
    config, target = small_config(), tmp_path / "saved"
    model = with_heads(config)
    tokenizer = small_tokenizer() if file == "tokenizer" else None
    save_pretrained(target, model.state_dict(), config, tokenizer, **WITH_HEADS)
    before = files_of(target)
    assert "1_Pooling/config.json" in before
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # writing more fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"saved cannot be written: .*File too large"):
            save_pretrained(target, changed, config, tokenizer, **WITH_HEADS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_tokenizer_without_a_mask_is_refused(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    small_config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).mask_token == "[MASK]"
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="mask_token"):
        load_tokenizer(tmp_path)


def test_a_hub_name_that_cannot_be_reached_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_bert_config, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"no-such-organisation/bert is neither a directory"):
            load("no-such-organisation/bert")
