"""The engine between a stage and DeepSpeed: what it hands on, what it asks of the device, captured steps."""

import collections
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bert_twins import paper_tasks
from devices import needs_cuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtfast.commands import open_directory
from mtfast.config import EngineConfig, HeadsConfig, RunConfig, TaskStageConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.models.checkpoint import CheckpointError
from mtfast.recipes import demo
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.graphs import StepGraphs
from mtfast.training.inputs import Inputs
from mtfast.training.loop import train_stage
from mtfast.training.run.weights import find_weights
from mtfast.training.stages import features as features_module
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads

SETTINGS = TaskStageConfig(batch_size=4, learning_rate=0.1, weight_decay=0.0)


class ReadBack(TorchDispatchMode):
    """Counts the operations whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    engine_module.start()
    config = demo()
    return replace(
        config,
        run_dir=str(tmp_path / "run"),
        model=replace(config.model, checkpoint=str(corpus.bert)),
        data=replace(config.data, tasks=str(corpus.tasks), cache_dir=str(Path(corpus.tasks) / "cache")),
        heads=replace(config.heads, epochs=3, batch_size=512),
    )


def stage_of(kind: type[Finetune] | type[Heads], config: RunConfig):
    run = open_directory(config)
    weights = find_weights(config.model, run, config.seed)
    load = Inputs(config.tasks, config.data, weights.tokenizer, run).load
    common = (load, weights, config.stage(kind.name), config.engine, config.seed)
    return kind(*common, config.path / "heads" / "state") if kind is Heads else kind(*common)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_reads_nothing_back(zero_stage, precision, config):
    engine = EngineConfig(precision=precision, zero_stage=zero_stage)
    stage = stage_of(Finetune, replace(config, engine=engine, finetune=TaskStageConfig()))
    stage.engine.train()
    batches = [batches for batches in stage.micro_batches(stage.plan(0)[:3], 0)]
    stage.step(batches[0][0])  # DeepSpeed sets up its buffers
    with ReadBack() as mode:
        for (batch,) in batches[1:]:
            stage.engine.set_learning_rate(1e-4)
            stage.step(batch)
    assert not mode.found


def test_a_step_on_cached_features_reads_nothing_back(config):
    stage = stage_of(Heads, config)
    stage.engine.train()
    batches = [batches for batches in stage.micro_batches(stage.plan(0)[:3], 0)]
    stage.step(batches[0][0])
    with ReadBack() as mode:
        for (batch,) in batches[1:]:
            stage.engine.set_learning_rate(1e-4)
            stage.step(batch)
    assert not mode.found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [Finetune, Heads])
def test_heads_whose_tasks_have_no_rows_in_a_step_are_decayed_alone(kind, zero_stage, config):
    """As by any optimizer to which they bring a gradient of zero."""
    sst, quora, sts = paper_tasks("lstm").values()
    rare = {"sst": replace(sst, max_rows=2), "sts": replace(sts, max_rows=2, head="other")}
    config = replace(
        config,
        tasks=rare | {"quora": replace(quora, max_rows=400)},
        engine=EngineConfig(precision="fp32", zero_stage=zero_stage),
        finetune=TaskStageConfig(batch_size=16),
        heads=HeadsConfig(batch_size=16),
    )
    stage = stage_of(kind, config)
    stage.engine.train()
    plan = stage.plan(0)
    (step,) = [step for step in plan if step.step_counts == {"sst": 0, "sts": 0, "quora": 16}][:1]
    before = stage.engine.state_dict()
    ((batch,),) = stage.micro_batches([step], 0)
    stage.engine.set_learning_rate(0.5)
    losses = stage.step(batch)
    assert losses.tolist() == [0.0, 0.0, pytest.approx(math.log(2), abs=0.1)]
    for name, weight in stage.engine.state_dict().items():
        decayed = before[name] * (1 - 0.5 * 0.01)
        if "task-sst" in name or "mlp-other" in name:
            torch.testing.assert_close(weight, decayed)
        elif "mlp-pair" in name:
            assert not torch.allclose(weight, decayed)
    stage.engine.close()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_first_update_is_adamws_on_the_exact_weights(zero_stage, precision):
    engine_module.start()
    torch.manual_seed(0)
    model = nn.Linear(24, 8)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, EngineConfig(precision=precision, zero_stage=zero_stage), SETTINGS, "finetune")
    assert all(torch.equal(engine.state_dict()[name], w) for name, w in weights.items())
    engine.set_learning_rate(0.25)
    x = torch.ones(4, 24, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    engine.step(engine.model(x).float().sum())  # every gradient is 4: Adam's first step is the learning rate
    for name, weight in weights.items():
        torch.testing.assert_close(engine.state_dict()[name], weight - 0.25, rtol=0, atol=1e-6)
    engine.close()


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    engine_module.start()
    engine = Engine(nn.Linear(4, 4), EngineConfig(precision="fp32", zero_stage=0), SETTINGS, "finetune")
    engine.save(tmp_path, 1, {"position": 1})

    def full(value, file, *_, **__) -> None:
        Path(file).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=f"could not be written to {tmp_path}: the disk is full or"):
            engine.save(tmp_path, 2, {"position": 2})
    assert engine.load(tmp_path)["position"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-1"]
    engine.close()


class Replaying:
    """Stands in for CUDA graphs: recording does no work, replaying calls the function again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def run(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        result = torch.full((3,), torch.nan)

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return replay, result


def test_steps_are_recorded_once_for_each_shape():
    seen: list[tuple[list[float], list[float]]] = []

    def step(inputs) -> Tensor:
        seen.append((inputs["a"].tolist(), inputs["b"].tolist()))
        return inputs["a"].sum().expand(3)

    recorder = Replaying()
    graphs = StepGraphs(step, recorder)
    batches = [([1.0, 2.0], [3.0]), ([4.0, 5.0], [6.0]), ([7.0], [8.0]), ([9.0, 1.0], [2.0]), ([3.0], [4.0])]
    results = [graphs({"a": torch.tensor(a), "b": torch.tensor(b)})[0].item() for a, b in batches]
    assert seen == batches and results == [3.0, 9.0, 7.0, 10.0, 3.0]
    assert recorder.recorded == 2 and recorder.replayed == 3


def test_recorded_head_training_is_the_unrecorded_one(config):
    ends = {}
    for name in ("plain", "recorded"):
        changed = replace(config, run_dir=f"{config.run_dir}-{name}")
        stage = stage_of(Heads, changed)
        recorder = Replaying()
        if name == "recorded":
            stage.graphs = StepGraphs(stage._step_on, recorder)
        result = train_stage(stage, open_directory(changed), changed.log_every)
        weights = stage.engine.state_dict()
        ends[name] = (result["summary"]["first_loss"], result["summary"]["last_loss"], weights)
    assert recorder.recorded > 0 and recorder.replayed > recorder.recorded
    assert ends["plain"][:2] == ends["recorded"][:2]
    assert all(torch.equal(x, ends["recorded"][2][name]) for name, x in ends["plain"][2].items())


JOINT_LSTM = replace(paper_tasks()["quora"], head="lstm", pair_input="joint")


@pytest.mark.parametrize(
    ("tasks", "of_lstm"),
    [
        (paper_tasks(), []),
        (paper_tasks("lstm"), ["sst"]),
        (paper_tasks("lstm") | {"quora": JOINT_LSTM}, ["sst", "quora"]),
    ],
    ids=["linear", "lstm", "two lstm"],
)
def test_a_table_in_a_file_gives_what_one_in_memory_gives(tasks, of_lstm, config, monkeypatch):
    config = replace(config, tasks=tasks)
    in_memory = stage_of(Heads, config)
    monkeypatch.setattr(features_module, "room", lambda device: 0)
    in_file = stage_of(Heads, config)
    files = list((config.path / "heads" / "state").rglob("*.bin"))
    assert len(files) == (4 if of_lstm else 2)
    assert torch.equal(in_file.table.cls, in_memory.table.cls)
    (batch,) = next(in_file.micro_batches(in_file.plan(0)[:1], 0))
    whole = in_memory.table.select(batch.examples, batch.token_bounds)
    monkeypatch.setattr(type(in_file.table), "resident", False)  # as if the heads were on another device
    part = in_file.table.select(batch.examples, batch.token_bounds)
    assert len(part.cls) < len(whole.cls)
    for task, rows in part.sequences.items():
        assert torch.equal(part.cls[rows], whole.cls[whole.sequences[task]])
    assert list(part.token_bounds) == list(whole.token_bounds) == of_lstm
    for task in of_lstm:
        bounds = (features.token_bounds[task].tolist() for features in (part, whole))
        for (b, e), (begin, end) in zip(*bounds, strict=True):
            assert torch.equal(part.tokens[b:e], whole.tokens[begin:end])


@needs_cuda
@pytest.mark.gpu
def test_captured_head_training_is_the_uncaptured_one(config):
    losses = {}
    for name in ("plain", "captured"):
        changed = replace(config, run_dir=f"{config.run_dir}-{name}")
        stage = stage_of(Heads, changed)
        assert stage.graphs is not None
        if name == "plain":
            stage.graphs = None
        losses[name] = train_stage(stage, open_directory(changed), changed.log_every)["summary"]
    for key in ("first_loss", "last_loss"):
        assert losses["captured"][key] == pytest.approx(losses["plain"][key], rel=1e-4)
