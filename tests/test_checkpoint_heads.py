"""Task heads in checkpoints: saved and loaded, of other tasks, of another form, of the first format."""

import json
from dataclasses import replace

import pytest
import torch
from bert_twins import pack, paper_tasks, random_sentences, small_config
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mtfast.models.checkpoint import CheckpointError, load_pretrained, load_tasks, save_heads, save_pretrained
from mtfast.models.multitask import MultiTaskHeads, MultiTaskModel, build_multitask_model
from mtfast.tasks import MlpConfig, Task

MLP = MlpConfig(48)
IMDB = Task(kind="binary", text="text", label="label")
NLI = Task(kind="classification", classes=3, text=("a", "b"), label="label", head="entailment")


def built(tasks: dict[str, Task], mlp: MlpConfig = MLP, dropout_p: float = 0.1) -> MultiTaskModel:
    return build_multitask_model(small_config(), tasks, mlp, dropout_p)


def saved(directory, model: MultiTaskModel) -> MultiTaskModel:
    config, of_heads = model.encoder.config, {"tasks": model.heads.tasks, "mlp": model.heads.mlp}
    save_pretrained(directory, model.state_dict(), config, None, **of_heads, max_length=32)
    return model


def outputs_of(model: MultiTaskModel, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    packed = pack(random_sentences([5, 9, 7], model.encoder.config.vocab_size, seed=0))
    bounds = packed["cu_seqlens"].long()
    lstm = [name for name, task in model.heads.tasks.items() if task.head == "lstm" and name in rows]
    token_bounds = {n: torch.stack([bounds[rows[n]] + 1, bounds[rows[n] + 1]], dim=1) for n in lstm}
    with torch.no_grad():
        return model.eval()(**packed, sequences=rows, token_bounds=token_bounds)


@pytest.mark.parametrize("head", ["linear", "lstm"])
@pytest.mark.parametrize("pair_input", ["separate", "joint"])
def test_task_heads_are_saved_and_loaded(tmp_path, head, pair_input):
    tasks, mlp = paper_tasks(head, pair_input), MlpConfig(40, "gelu")
    model = saved(tmp_path / "saved", built(tasks, mlp))
    of_model = {name: replace(task, aliases={}) for name, task in tasks.items()}
    assert load_tasks(tmp_path / "saved") == (of_model, mlp)
    again = built(tasks, mlp)
    assert not load_pretrained(tmp_path / "saved", again).initialised
    pairs = torch.tensor([[1, 2]]) if pair_input == "separate" else torch.tensor([1])
    rows = {"sst": torch.tensor([0, 2]), "quora": pairs, "sts": pairs}
    expected, found = outputs_of(model, rows), outputs_of(again, rows)
    assert all(torch.equal(found[task], expected[task]) for task in rows)
    alone = MultiTaskHeads(64, tasks, mlp, 0.1)
    assert not load_pretrained(tmp_path / "saved", alone).initialised
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.heads.parameters(), strict=True))


def test_where_data_comes_from_is_not_saved(tmp_path):
    task = replace(
        IMDB,
        aliases={"text": ("review",)},
        source="/home/me/imdb",
        splits={"dev": "test"},
        max_rows=9,
        weight=2,
    )
    task = replace(task, title="Movies", metric="f1")
    saved(tmp_path / "saved", built({"imdb": task, "nli": replace(NLI, classes=("yes", "no", "maybe"))}))
    assert load_tasks(tmp_path / "saved") == (
        {
            "imdb": replace(IMDB, title="Movies", metric="f1"),
            "nli": replace(NLI, classes=("yes", "no", "maybe")),
        },
        MLP,
    )
    assert "/home/me" not in (tmp_path / "saved" / "mtfast.json").read_text()
    load_pretrained(tmp_path / "saved", built({"imdb": task}))


@pytest.mark.parametrize(
    ("changes", "mlp", "what", "there", "here"),
    [
        ({"sst": {"head": "lstm"}}, MLP, "sst.head", "linear", "lstm"),
        ({"sst": {"classes": 3}}, MLP, "sst.outputs", 5, 3),
        ({"sst": {"kind": "binary", "classes": None}}, MLP, "sst.kind", "classification", "binary"),
        (
            {"quora": {"pair_input": "joint"}, "sts": {"pair_input": "joint"}}, MLP,
            "quora.pair_input", "separate", "joint",
        ),
        ({"quora": {"kind": "regression", "low": 0, "high": 1}}, MLP, "quora.kind", "binary", "regression"),
        ({}, MlpConfig(32), "mlp.width", 48, 32),
        ({}, MlpConfig(48, "tanh"), "mlp.activation", "relu", "tanh"),
        ({"sts": {"head": "other"}}, MLP, "tasks of mlp-pair", "quora, sts", "quora"),
    ],
)  # fmt: skip
def test_a_head_of_another_form_is_refused_with_its_name(tmp_path, changes, mlp, what, there, here):
    saved(tmp_path / "saved", built(paper_tasks()))
    tasks = {name: replace(task, **changes.get(name, {})) for name, task in paper_tasks().items()}
    for model in (built(tasks, mlp), built(tasks, mlp).heads):
        with pytest.raises(CheckpointError) as raised:
            load_pretrained(tmp_path / "saved", model)
        both = f"have {what} = {there!r}, this run asks for {what} = {here!r}"
        assert str(raised.value) == f"the task heads of {tmp_path / 'saved'} {both}"


def test_the_order_of_a_heads_tasks_is_part_of_its_form(tmp_path):
    saved(tmp_path / "saved", built(paper_tasks()))
    turned = {name: paper_tasks()[name] for name in ("sts", "sst", "quora")}
    with pytest.raises(CheckpointError, match=r"mlp-pair = 'quora, sts', this run .* = 'sts, quora'"):
        load_pretrained(tmp_path / "saved", built(turned))


def test_classes_in_another_order_are_another_form(tmp_path):
    saved(tmp_path / "saved", built({"nli": replace(NLI, classes=("yes", "no", "maybe"))}))
    load_pretrained(tmp_path / "saved", built({"nli": NLI}))  # whose classes go by their numbers
    turned = built({"nli": replace(NLI, classes=("no", "yes", "maybe"))})
    with pytest.raises(CheckpointError, match=r"nli\.classes = \('yes', .*asks for nli\.classes = \('no', "):
        load_pretrained(tmp_path / "saved", turned)


def test_what_is_no_part_of_a_heads_form_may_differ(tmp_path):
    model = saved(tmp_path / "saved", built(paper_tasks()))
    tasks = {n: replace(task, weight=3.0, title="x", max_rows=5) for n, task in paper_tasks().items()}
    again = built(dict(sorted(tasks.items())), dropout_p=0.3)  # quora, sst, sts
    assert not load_pretrained(tmp_path / "saved", again).initialised
    found = again.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items())
    # The MLPs' width and activation say nothing where no task has one.
    sst = {"sst": paper_tasks()["sst"]}
    assert not load_pretrained(tmp_path / "saved", built(sst, MlpConfig(7, "tanh"))).initialised


def test_heads_of_other_tasks_are_ignored_and_those_that_lack_are_fresh(tmp_path):
    model = saved(tmp_path / "saved", built(paper_tasks() | {"imdb": IMDB}))
    torch.manual_seed(7)
    other = built({"nli": NLI, "imdb": IMDB, "sst": paper_tasks()["sst"]})
    fresh = {name: x.clone() for name, x in other.heads.get_submodule("mlp-entailment").state_dict().items()}
    report = load_pretrained(tmp_path / "saved", other)
    of_mlp = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    assert set(report.ignored) == {f"heads.mlp-pair.mlp.{name}" for name in of_mlp}
    assert set(report.initialised) == {f"heads.mlp-entailment.mlp.{name}" for name in of_mlp}
    assert not any(name.startswith("heads.") for name in report.carried)
    said = report.summary()
    assert "freshly initialised: heads.mlp-entailment" in said and said.endswith("; ignored: heads.mlp-pair")
    found, expected = other.state_dict(), model.state_dict()
    for name in found:
        if "mlp-entailment" not in name:
            assert torch.equal(found[name], expected[name]), name
    assert all(torch.equal(found[f"heads.mlp-entailment.{name}"], x) for name, x in fresh.items())

    heads = MultiTaskHeads(64, {"nli": NLI, "imdb": IMDB}, MLP, 0.1)
    report = load_pretrained(tmp_path / "saved", heads)
    assert {name.split(".")[1] for name in report.initialised} == {"mlp-entailment"}
    assert {name.split(".")[1] for name in report.ignored} == {"mlp-pair", "task-sst"}
    assert torch.equal(
        heads.state_dict()["task-imdb.classifier.bias"], expected["heads.task-imdb.classifier.bias"]
    )


def test_state_with_heads_needs_their_tasks(tmp_path):
    model = built(paper_tasks())
    whole = {"tasks": paper_tasks(), "mlp": MLP, "max_length": 32}
    for lacking in whole:
        given = {name: value for name, value in whole.items() if name != lacking}
        with pytest.raises(ValueError, match="tasks, mlp and max_length must be given"):
            save_pretrained(tmp_path / "x", model.state_dict(), small_config(), None, **given)
    with pytest.raises(ValueError, match="tasks, mlp and max_length must be given"):
        save_pretrained(tmp_path / "x", model.encoder.state_dict(), small_config(), None, **whole)
    assert not list(tmp_path.iterdir())


def test_heads_saved_alone_load_into_heads(tmp_path):
    heads, again = (MultiTaskHeads(64, paper_tasks(), MLP, 0.1) for _ in range(2))
    save_heads(tmp_path / "heads", heads.state_dict(), paper_tasks(), MLP)
    assert not load_pretrained(tmp_path / "heads", again).initialised
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"heads.*is \[48, 128\], the model's is \[48, 256\]"):
        load_pretrained(tmp_path / "heads", MultiTaskHeads(128, paper_tasks(), MLP, 0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has format None; this mtfast reads 2"),
        ('{"format": 3, "tasks": {}, "mlp": {}}', "has format 3; this mtfast reads 2"),
        ('{"format": 2}', "does not describe tasks and their heads: 'tasks'"),
        ('{"format": 2, "tasks": [1], "mlp": {}}', "does not describe tasks and their heads"),
        (
            '{"format": 2, "tasks": {"sst": {"kind": "binary"}}, "mlp": {}}',
            "does not describe tasks .*'text'",
        ),
        ('{"format": 2, "tasks": {}, "mlp": {"inner": 3}}', "does not describe tasks .*'inner'"),
    ],
)
def test_a_description_of_heads_that_cannot_be_read_is_named(tmp_path, text, message):
    saved(tmp_path / "saved", built(paper_tasks()))
    (tmp_path / "saved" / "mtfast.json").write_text(text)
    for load in (load_tasks, lambda path: load_pretrained(path, built(paper_tasks()))):
        with pytest.raises(CheckpointError, match=rf"mtfast\.json {message}"):
            load(tmp_path / "saved")


def test_heads_without_their_tensors_are_named(tmp_path):
    saved(tmp_path / "saved", built(paper_tasks()))
    (tmp_path / "saved" / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has mtfast\.json but no heads\.safetensors"):
        load_pretrained(tmp_path / "saved", built(paper_tasks()))


def write_format_1(directory, **changes) -> dict[str, torch.Tensor]:
    """An encoder with heads as they were saved before tasks were declared; the heads' tensors."""
    heads = {
        "sentiment": "linear",
        "pair_input": "separate",
        "inner": 24,
        "activation": "gelu",
        "dropout_p": 0.1,
    }
    heads |= changes
    torch.manual_seed(3)
    width = 128 if heads["pair_input"] == "separate" else 64
    dense = "heads.pair.mlp" if heads["pair_input"] == "separate" else "heads.pair"
    tensors = {
        "heads.sentiment.classifier.weight": torch.randn(5, 64),
        "heads.sentiment.classifier.bias": torch.randn(5),
        f"{dense}.dense.weight": torch.randn(24, width) / 8,
        f"{dense}.dense.bias": torch.randn(24),
        f"{dense}.out_proj.weight": torch.randn(2, 24),
        f"{dense}.out_proj.bias": torch.randn(2),
    }
    if heads["sentiment"] == "lstm":
        tensors["heads.sentiment.classifier.weight"] = torch.randn(5, 128)
        for direction in ("", "_reverse"):
            for name, shape in (("weight_ih", (128, 64)), ("weight_hh", (128, 32))):
                tensors[f"heads.sentiment.lstm.{name}_l0{direction}"] = torch.randn(shape) / 8
            for name in ("bias_ih", "bias_hh"):
                tensors[f"heads.sentiment.lstm.{name}_l0{direction}"] = torch.randn(128)
    encoder = built({"imdb": IMDB}).encoder
    save_pretrained(directory, encoder.state_dict(), encoder.config, None)
    save_file(tensors, directory / "heads.safetensors")
    (directory / "mtfast.json").write_text(json.dumps({"format": 1, "heads": heads}))
    return tensors


@pytest.mark.parametrize("pair_input", ["separate", "joint"])
@pytest.mark.parametrize("names", [("sst", "quora", "sts"), ("mood", "same", "near")])
def test_heads_of_format_1_give_what_they_gave(tmp_path, names, pair_input):
    tensors = write_format_1(tmp_path / "saved", pair_input=pair_input)
    tasks = dict(zip(names, paper_tasks(pair_input=pair_input).values(), strict=True))
    model = built(tasks, MlpConfig(24, "gelu"))
    report = load_pretrained(tmp_path / "saved", model)
    assert not report.initialised and not report.ignored
    pairs = torch.tensor([[1, 2], [0, 0]]) if pair_input == "separate" else torch.tensor([1, 0])
    rows = dict(zip(names, (torch.tensor([0, 2]), pairs, pairs), strict=True))
    found = outputs_of(model, rows)

    packed = pack(random_sentences([5, 9, 7], 211, seed=0))
    with torch.no_grad():
        cls = model.encoder(**packed, cls_only=True)

    def linear(x, name):
        return x @ tensors[f"heads.{name}.weight"].T + tensors[f"heads.{name}.bias"]

    mlp = "pair.mlp" if pair_input == "separate" else "pair"
    of_pairs = linear(F.gelu(linear(cls[pairs].flatten(1), f"{mlp}.dense")), f"{mlp}.out_proj")
    expected = (linear(cls[[0, 2]], "sentiment.classifier"), of_pairs[:, 0], of_pairs[:, 1])
    for name, output in zip(names, expected, strict=True):
        assert torch.allclose(found[name], output, atol=1e-5), name


def test_an_lstm_head_of_format_1_had_no_hidden_layer(tmp_path):
    write_format_1(tmp_path / "saved", sentiment="lstm")
    model = built(paper_tasks("lstm"), MlpConfig(24, "gelu"))
    with pytest.raises(CheckpointError, match=r"task-sst of .*saved has no dense.weight: .* train the heads"):
        load_pretrained(tmp_path / "saved", model)


def test_a_head_of_which_a_tensor_is_missing_is_no_head(tmp_path):
    """It would predict with weights that are not trained."""
    saved(tmp_path / "saved", built(paper_tasks()))
    file = tmp_path / "saved" / "heads.safetensors"
    tensors = load_file(file)
    del tensors["heads.mlp-pair.mlp.out_proj.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"mlp-pair of .*saved has no mlp.out_proj.bias"):
        load_pretrained(tmp_path / "saved", built(paper_tasks()))


@pytest.mark.parametrize(
    ("tasks", "mlp", "message"),
    [
        (paper_tasks("lstm"), MlpConfig(24, "gelu"), "sentiment = 'linear', .* sentiment = 'lstm'"),
        (paper_tasks(pair_input="joint"), MlpConfig(24, "gelu"), "pair_input = 'separate', .* = 'joint'"),
        (paper_tasks(), MlpConfig(25, "gelu"), "inner = 24, .* = 25"),
        (paper_tasks(), MlpConfig(24, "relu"), "activation = 'gelu', .* = 'relu'"),
        (
            paper_tasks() | {"sts": replace(paper_tasks()["sts"], head="other")}, MlpConfig(24, "gelu"),
            "heads of the two tasks on pairs = 'one MLP', .* = 'pair and other'",
        ),
        (
            {
                name: replace(task, head="linear", pair_input="joint") if task.has_mlp else task
                for name, task in paper_tasks().items()
            },
            MlpConfig(24, "gelu"), "heads of the two tasks on pairs = 'one MLP', .* = 'linear and linear'",
        ),
    ],
)  # fmt: skip
def test_heads_of_format_1_in_another_form_are_refused_with_the_field(tmp_path, tasks, mlp, message):
    write_format_1(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"the task heads of .*saved have {message}"):
        load_pretrained(tmp_path / "saved", built(tasks, mlp))


def test_heads_of_format_1_are_ignored_by_other_tasks(tmp_path):
    write_format_1(tmp_path / "saved")
    model = built(paper_tasks() | {"imdb": IMDB}, MlpConfig(24, "gelu"))
    report = load_pretrained(tmp_path / "saved", model)
    assert {name.split(".")[1] for name in report.initialised if name.startswith("heads.")} == {
        "task-sst", "mlp-pair", "task-imdb",
    }  # fmt: skip
    assert any("sentiment" in name for name in report.ignored)


@pytest.mark.parametrize("heads", [3, [], {}, None])
def test_a_description_of_format_1_that_cannot_be_read_is_named(tmp_path, heads):
    write_format_1(tmp_path / "saved")
    (tmp_path / "saved" / "mtfast.json").write_text(json.dumps({"format": 1, "heads": heads}))
    with pytest.raises(CheckpointError, match="saved have sentiment = None, this run asks for sentiment"):
        load_pretrained(tmp_path / "saved", built(paper_tasks(), MlpConfig(24, "gelu")))
