"""`load`, `predict` and `encode`, against Hugging Face's BertModel and the saved heads by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import (
    MAX_LENGTH,
    MLP,
    TASKS,
    Oracle,
    bert_config,
    configure,
    finetuned_run,
    finish,
    heads_run,
    save_encoder,
    some_texts,
)
from small_tokenizer import small_tokenizer
from transformers import AutoModel, AutoTokenizer

from mtfast.config import ConfigError, EngineConfig
from mtfast.errors import Error
from mtfast.models.checkpoint import CheckpointError, save_pretrained
from mtfast.models.multitask import build_multitask_model
from mtfast.predict import Model, load
from mtfast.training import prediction
from mtfast.training.seeds import seed_for


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finetuned_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model(run) -> Model:
    return load(run)


@pytest.fixture(scope="module")
def oracle(run) -> Oracle:
    best = run / "finetune" / "best-mean"
    return Oracle(best, best / "heads.safetensors")


def examples_of(task: str, count: int) -> list:
    texts = some_texts(count)
    if len(TASKS[task].texts) == 1:
        return texts
    return list(zip(texts, some_texts(count, seed=1), strict=True))


def compare(model: Model, oracle: Oracle, task: str, examples: list) -> None:
    found, outputs = model.predict(task, examples), oracle.outputs(task, examples)
    kind, classes = TASKS[task].kind, TASKS[task].classes
    assert len(found) == len(examples)
    if kind == "regression":
        assert found.labels is None and found.probabilities is None
        assert found.scores.dtype == np.float32
        assert found.scores == pytest.approx(outputs[:, 0].numpy(), abs=1e-5, rel=1e-5)
        return
    assert found.scores is None and found.probabilities.dtype == np.float32
    if kind == "binary":
        probabilities, labels = outputs[:, 0].sigmoid(), (outputs[:, 0] > 0).long()
    else:
        probabilities, labels = outputs.softmax(1), outputs.argmax(1)
    assert found.probabilities == pytest.approx(probabilities.numpy(), abs=1e-5)
    wanted = [classes[label] for label in labels] if isinstance(classes, tuple) else labels.tolist()
    assert found.labels.tolist() == wanted
    assert found.labels.dtype.kind == "U" if isinstance(classes, tuple) else found.labels.dtype == np.int64


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_what_the_saved_weights_say(model, oracle, task):
    examples = examples_of(task, 30)
    compare(model, oracle, task, examples)
    found = model.predict(task, examples)
    assert len(set((found.scores if found.labels is None else found.labels).tolist())) > 1


def test_a_run_without_fine_tuning_has_its_own_encoder_and_heads(tmp_path):
    run = heads_run(tmp_path / "run")
    oracle = Oracle(run / "pretrain" / "last", run / "heads" / "best-mean" / "heads.safetensors")
    model = load(run)
    for task in TASKS:
        compare(model, oracle, task, examples_of(task, 20))


def test_an_encoder_that_was_never_saved_is_the_one_that_the_seed_gives(tmp_path):
    run = heads_run(tmp_path / "run", save_encoder(tmp_path / "bert"))
    torch.manual_seed(seed_for(3))
    state = build_multitask_model(bert_config(), TASKS, MLP, 0.1).encoder.state_dict()
    save_pretrained(tmp_path / "fresh", state, bert_config(), small_tokenizer())
    oracle = Oracle(tmp_path / "fresh", run / "heads" / "best-mean" / "heads.safetensors")
    compare(load(run), oracle, "near", examples_of("near", 20))


def test_a_vector_is_that_of_cls(model, run):
    best = run / "finetune" / "best-mean"
    tokenizer, bert = AutoTokenizer.from_pretrained(best), AutoModel.from_pretrained(best).eval()
    texts = [*some_texts(20), " ".join(["good film"] * 30)]
    found = model.encode(texts)
    assert found.dtype == np.float32 and found.shape == (21, 64)
    for vector, text in zip(found, texts, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
        with torch.no_grad():
            wanted = bert(**inputs).last_hidden_state[0, 0]
        assert vector == pytest.approx(wanted.numpy(), abs=1e-5)


@pytest.mark.parametrize("what", ["checkpoint with heads", "with a subfolder", "pre-trained", "plain"])
def test_checkpoints_encode_and_those_with_heads_predict(run, model, tmp_path, what):
    texts = some_texts(8)
    if what == "checkpoint with heads":
        found = load(str(run / "finetune" / "best-mean"))
        assert list(found.tasks) == list(TASKS)
        np.testing.assert_array_equal(found.encode(texts), model.encode(texts))
        wanted = model.predict("tone", texts).probabilities
        np.testing.assert_array_equal(found.predict("tone", texts).probabilities, wanted)
        return
    bert = AutoModel.from_pretrained(save_encoder(tmp_path / "pretrained")).eval()
    source = tmp_path / "pretrained"
    if what == "plain":
        source = tmp_path / "plain"
        bert.save_pretrained(source)
        small_tokenizer().save_pretrained(source)
    elif what == "with a subfolder":
        source = tmp_path / "sentences"
        shutil.copytree(tmp_path / "pretrained", source / "0_Transformer")
        module = {"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}
        (source / "modules.json").write_text(json.dumps([module]))
    found = load(source)
    with torch.no_grad():
        inputs = small_tokenizer()(texts[0], return_tensors="pt")
        wanted = bert(**inputs).last_hidden_state[0, 0].numpy()
    assert found.encode(texts)[0] == pytest.approx(wanted, abs=1e-5)
    assert found.tasks == {}
    with pytest.raises(ConfigError, match=f"{source.name} has no task heads, so that it can encode but not"):
        found.predict("stars", texts)


@pytest.mark.parametrize("task", ["stars", "tone", "same", "nli"])
def test_order_is_kept_over_many_batches(model, task, monkeypatch):
    monkeypatch.setattr(prediction, "EVALUATION_TOKENS", 50)
    examples = examples_of(task, 40)
    order = np.random.default_rng(0).permutation(40)
    found = model.predict(task, examples).probabilities
    assert len({tuple(row) for row in found.reshape(40, -1).tolist()}) > 30
    shuffled = model.predict(task, [examples[i] for i in order]).probabilities
    np.testing.assert_allclose(shuffled, found[order], atol=1e-6)
    vectors = model.encode([str(i) for i in range(40)])
    np.testing.assert_allclose(model.encode([str(i) for i in order]), vectors[order], atol=1e-5)


def test_one_example_counts_as_a_list_of_one_and_any_iterable_will_do(model):
    texts = some_texts(6)
    one = model.predict("stars", texts[0]).probabilities
    assert one.shape == (1, 5)
    np.testing.assert_array_equal(one, model.predict("stars", texts[:1]).probabilities)
    np.testing.assert_array_equal(model.encode(texts[0]), model.encode(texts[:1]))
    pair = model.predict("near", (texts[0], texts[1])).scores
    assert pair.shape == (1,)
    np.testing.assert_array_equal(pair, model.predict("near", [texts[:2]]).scores)
    pairs = [(texts[0], texts[1]), (texts[2], texts[3])]
    np.testing.assert_array_equal(
        model.predict("near", np.array(pairs)).scores, model.predict("near", pairs).scores
    )
    wanted = model.predict("mood", texts).labels
    for given in (tuple(texts), np.array(texts), iter(texts), dict.fromkeys(texts)):
        np.testing.assert_array_equal(model.predict("mood", given).labels, wanted)


def test_texts_are_read_as_the_readers_of_training_data_do(model):
    text = some_texts(1)[0]
    np.testing.assert_array_equal(model.encode(f" \t{text}\n"), model.encode(text))


def test_nothing_gives_empty_arrays(model):
    assert model.encode([]).shape == (0, 64) and model.encode([]).dtype == np.float32
    stars, mood, same = (model.predict(task, []) for task in ("stars", "mood", "same"))
    assert stars.probabilities.shape == (0, 5) and stars.labels.dtype == np.int64 and len(stars) == 0
    assert mood.labels.shape == (0,) and mood.labels.dtype.kind == "U"
    assert same.probabilities.shape == same.labels.shape == (0,) and same.labels.dtype == np.int64
    near = model.predict("near", [])
    assert near.scores.shape == (0,) and near.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("sst", "good", r"run has no task 'sst'; its tasks are stars, mood, tone, same, near, nli"),
        ("stars", ["good", 5], r"texts\[1\] is 5, not a text; stars takes texts"),
        ("stars", ["good", float("nan")], r"texts\[1\] is nan, not a text"),
        ("stars", [("a", "b")], r"texts\[0\] is \('a', 'b'\), not a text; stars takes texts"),
        ("stars", None, r"texts is None; it should be a text, or texts"),
        ("stars", ["good", " \n"], r"texts\[1\] is ' \\n', a text without a word"),
        ("stars", "", r"texts\[0\] is '', a text without a word"),
        ("stars", b"good", r"texts\[0\] is 103, not a text"),
        ("stars", ["good", "a\udc80"], r"texts\[1\] holds '\\udc80', half of a surrogate pair"),
        ("same", "good", r"texts is 'good'; it should be a pair \(first, second\), or pairs"),
        (
            "same",
            ["good", "bad"],
            r"texts\[0\] is 'good', not a pair; same takes pairs of texts, each a tuple",
        ),
        ("same", [("a", "b"), ("a", "b", "c")], r"texts\[1\] is \('a', 'b', 'c'\), not a pair"),
        ("same", [("a", "b"), ("a", None)], r"texts\[1\]\[1\] is None, not a text; same takes pairs"),
        ("nli", [("", "b")], r"texts\[0\]\[0\] is '', a text without a word"),
    ],
)
def test_what_is_wrong_with_texts_is_told(model, task, texts, message):
    with pytest.raises(ValueError, match=message):
        model.predict(task, texts)


def test_only_texts_have_vectors(model):
    with pytest.raises(ValueError, match=r"texts\[0\] is \('a', 'b'\), not a text; encode takes texts"):
        model.encode([("a", "b")])


def contents(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_read_only_copy_elsewhere_gives_the_same_and_leaves_no_trace(
    run, model, tmp_path, capfd, monkeypatch
):
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    before, state = contents(tmp_path), torch.get_rng_state()
    found = load(copy)
    for task in TASKS:
        examples = examples_of(task, 5)
        mine, theirs = found.predict(task, examples), model.predict(task, examples)
        for name in ("labels", "probabilities", "scores"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    np.testing.assert_array_equal(found.encode("good"), model.encode("good"))
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path) == before
    assert capfd.readouterr() == ("", "")


def test_it_needs_neither_what_trains_nor_what_plots(run):
    code = (
        "import sys; from mtfast.predict import load; "
        f"load({str(run)!r}).predict('stars', 'good'); "
        "print({'deepspeed', 'datasets', 'matplotlib', 'sentencex'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_precision_is_the_runs_unless_another_is_wanted(run, tmp_path):
    texts = some_texts(20)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    configure(copy, engine=EngineConfig(precision="bf16"))
    in_bf16, in_fp32 = load(copy).encode(texts), load(run).encode(texts)
    np.testing.assert_array_equal(load(copy, precision="fp32").encode(texts), in_fp32)
    np.testing.assert_array_equal(load(run, precision="bf16").encode(texts), in_bf16)
    assert in_bf16.dtype == np.float32 and 1e-4 < np.abs(in_bf16 - in_fp32).max() < 0.3
    with pytest.raises(ConfigError, match="precision is 'fp16'; it must be bf16 or fp32"):
        load(run, precision="fp16")


def without_a_head(directory: Path) -> None:
    file = directory / "heads.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "task-mood" not in name}, file)


def test_what_cannot_be_loaded_is_told(run, tmp_path):
    def refused(source: Path, message: str, kind: type[Error] = CheckpointError) -> None:
        with pytest.raises(kind, match=message):
            load(source)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(
        empty, "empty is neither a run's directory, which holds config.yaml, nor a checkpoint, which holds"
    )
    refused(run / "finetune", rf"finetune is neither .*; load the run that it is part of, {run}$")
    refused(tmp_path / "nowhere", "nowhere does not exist")

    heads = heads_run(tmp_path / "two" / "heads")
    refused(
        heads / "heads" / "best-mean", rf"holds task heads without their encoder; load the run .* {heads}$"
    )
    (heads / "heads" / "result.json").unlink()
    elsewhere = heads_run(tmp_path / "elsewhere", tmp_path / "missing")
    refused(elsewhere, rf"the weights of {elsewhere}: {tmp_path}/missing does not exist")
    refused(heads, r"heads holds no finished heads or finetune stage; train one first", ConfigError)
    finish(heads, "heads")
    without_a_head(heads / "heads" / "best-mean")
    refused(heads, r"heads/best-mean lacks weights of the task heads: heads.task-mood.classifier.weight")
    refused(tmp_path / "two", rf"two holds several runs; load one of them, {heads}$")

    shutil.copytree(run, tmp_path / "torn")
    without_a_head(tmp_path / "torn" / "finetune" / "best-mean")
    refused(tmp_path / "torn", "torn/finetune/best-mean lacks weights|torn lacks weights of the task heads")
    (tmp_path / "torn" / "config.yaml").write_text("recipe: [", encoding="utf-8")
    refused(tmp_path / "torn", r"config.yaml:1: not YAML", ConfigError)
