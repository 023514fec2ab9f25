"""Steps as CUDA graphs: which are recorded and kept, and that a graph's step is the step, in every stage."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from bert_twins import paper_tasks, small_corpus
from devices import needs_cuda
from safetensors.torch import load_file
from stages import demo_on, stage_of
from tape import TapeRecorder
from torch import Tensor

from mtfast import commands
from mtfast.config import EngineConfig, RunConfig
from mtfast.training import stage as stage_module
from mtfast.training.engine import graphs as graphs_module
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.graphs import StepGraphs
from mtfast.training.stage import Stage
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain

STAGES = {"pretrain": Pretrain, "heads": Heads, "finetune": Finetune}


@dataclass(frozen=True)
class Numbers:
    """A batch of one tensor."""

    x: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def clone(self) -> "Numbers":
        return Numbers(self.x.clone())

    def copy_(self, other: "Numbers") -> None:
        self.x.copy_(other.x)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(TapeRecorder, "recorded", 0)
    monkeypatch.setattr(TapeRecorder, "replayed", 0)


def test_steps_are_recorded_once_for_each_shape():
    graphs = StepGraphs(lambda batch: batch.x.sum().expand(3), TapeRecorder())
    batches = [[1.0, 2.0], [4.0, 5.0], [7.0], [9.0, 1.0], [3.0]]
    results = [graphs(Numbers(torch.tensor(numbers))).tolist() for numbers in batches]
    assert results == [[sum(numbers)] * 3 for numbers in batches]
    assert TapeRecorder.recorded == 2 and TapeRecorder.replayed == 3


def test_the_graph_used_least_makes_room(monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 2)
    ran = []
    graphs = StepGraphs(lambda batch: ran.append(len(batch.x)) or batch.x.sum(), TapeRecorder())

    def run(*lengths: int) -> list[int]:
        """Which of these steps were called, and not replayed."""
        ran.clear()
        for length in lengths:
            assert graphs(Numbers(torch.arange(float(length)))).item() == sum(range(length))
        return list(ran)

    assert run(1, 1, 1, 1, 2, 2, 2, 1, 2) == [1, 1, 2, 2]
    # 1 has been used five times and 2 four times: the fifth of 3 is recorded in the place of 2.
    assert run(3, 3, 3, 3, 3) == [3, 3, 3, 3, 3]
    assert run(3, 1) == []
    assert run(2) == [2]


def test_a_tape_shows_what_a_step_reads_beside_its_batch():
    """Else the tests below would pass with a step whose input is forgotten."""
    rate = itertools.count(1)
    graphs = StepGraphs(lambda batch: batch.x.sum() * next(rate), TapeRecorder())
    assert [graphs(Numbers(torch.ones(2))).item() for _ in range(4)] == [2.0, 4.0, 4.0, 4.0]
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits for the device"):
        waits = StepGraphs(lambda batch: batch.x.sum() * batch.x[0].item(), TapeRecorder())
        [waits(Numbers(torch.ones(2))) for _ in range(2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("demo"), 120)


def train(config: RunConfig) -> None:
    """All stages; what follows them, predictions and the report, is nothing that graphs see."""
    for stage in config.stages:
        commands.train(config, stage)


def small_run(corpus, run_dir: Path, precision: str = "fp32", head: str = "linear") -> RunConfig:
    """Some steps of every stage, of several shapes, with dropout, clipping and a learning rate that moves."""
    config, moving = demo_on(corpus, run_dir), {"schedule": "linear", "gradient_clipping": 0.5, "epochs": 2}
    return replace(
        config,
        log_every=1,
        tasks=paper_tasks(head),
        data=replace(config.data, max_reviews=40),
        engine=EngineConfig(precision=precision),
        pretrain=replace(config.pretrain, batch_size=8, masking="dynamic", **moving),
        heads=replace(config.heads, batch_size=64, **moving),
        finetune=replace(config.finetune, batch_size=32, **moving),
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The learning rate is a tensor, and a tape stands in for a graph."""
    monkeypatch.setattr(Engine, "_is_capturable", lambda *_: True)
    monkeypatch.setattr(stage_module, "CudaRecorder", TapeRecorder)


def what_is_left(run_dir: Path) -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
    """The losses and metrics of a run, and its weights, by their file."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: r.get(key) for key in ("stage", "step", "losses", "metrics")} for r in records]
    weights = {str(f.relative_to(run_dir)): load_file(f) for f in sorted(run_dir.rglob("last/*.safetensors"))}
    return kept, weights


def assert_same(first: Path, second: Path) -> None:
    (losses, weights), (others, other_weights) = what_is_left(first), what_is_left(second)
    assert losses == others and len(losses) > 20
    assert {name.split("/")[0] for name in weights} == set(STAGES)
    for file, tensors in weights.items():
        assert all(torch.equal(x, other_weights[file][name]) for name, x in tensors.items()), file


CASES = [("fp32", "lstm"), ("bf16", "linear")]


@pytest.mark.parametrize(("precision", "head"), CASES)
def test_a_run_of_graphs_is_the_run_without(precision, head, corpus, tmp_path, as_on_a_gpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "graphs", None)
        train(small_run(corpus, tmp_path / "plain", precision, head))
        assert TapeRecorder.recorded == 0
    train(small_run(corpus, tmp_path / "recorded", precision, head))
    assert TapeRecorder.recorded >= 3 and TapeRecorder.replayed > 2 * TapeRecorder.recorded
    assert_same(tmp_path / "plain", tmp_path / "recorded")


class Interrupted(Exception):
    pass


def test_a_run_of_graphs_goes_on_as_the_uninterrupted_one(corpus, tmp_path, as_on_a_gpu, monkeypatch):
    """From the last state of each stage, in which other steps are the first of their shape."""
    train(small_run(corpus, tmp_path / "whole"))
    step, made = Stage.step, {}

    def interrupt(stage: Stage, batch) -> Tensor:
        made[stage.name] = made.get(stage.name, 0) + 1
        steps = len(stage.plan(0))
        if made[stage.name] == steps + steps // 2:  # in the middle of the second epoch
            raise Interrupted
        return step(stage, batch)

    monkeypatch.setattr(Stage, "step", interrupt)
    for _ in STAGES:
        with pytest.raises(Interrupted):
            train(small_run(corpus, tmp_path / "interrupted"))
    train(small_run(corpus, tmp_path / "interrupted"))
    assert_same(tmp_path / "whole", tmp_path / "interrupted")


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("features", ["cached", "live"])
@pytest.mark.parametrize(("precision", "head"), [*CASES, ("bf16", "lstm")])
def test_captured_training_is_the_uncaptured_one(precision, head, features, corpus, tmp_path, monkeypatch):
    def run(name: str) -> None:
        config = small_run(corpus, tmp_path / name, precision, head)
        train(replace(config, heads=replace(config.heads, features=features)))

    run("captured")
    monkeypatch.setattr(Stage, "graphs", None)
    run("plain")
    (found, _), (expected, _) = what_is_left(tmp_path / "captured"), what_is_left(tmp_path / "plain")
    losses = [
        [list(record["losses"].values()) for record in run if record["losses"]] for run in (found, expected)
    ]
    assert len(losses[0]) == len(losses[1]) > 20
    for found, expected in zip(*losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("head", ["linear", "lstm"])
@pytest.mark.parametrize("name", STAGES)
def test_no_step_waits_for_the_gpu(name, head, corpus, tmp_path, monkeypatch):
    """Launched one by one, which a graph would not be captured from either."""
    monkeypatch.setattr("mtfast.ops._library.CHECK_VALUES", False)  # which waits
    stage = stage_of(STAGES[name], small_run(corpus, tmp_path, "bf16", head))
    stage.engine.train()
    batches = [batch for (batch,) in stage.micro_batches(stage.plan(0)[:6], 0)]
    stage.train_on(batches[0])  # what is set up at first use may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            stage.engine.set_learning_rate(1e-4)
            stage.train_on(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stage.engine.close()
