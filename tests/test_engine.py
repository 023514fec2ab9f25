"""The engine between a stage and DeepSpeed: what it hands on, what it asks of the device."""

import collections
import math
from dataclasses import replace

import pytest
import torch
from bert_twins import paper_tasks, small_corpus
from stages import demo_on, stage_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtfast.config import EngineConfig, HeadsConfig, RunConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.stages import features as features_module
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain

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
    return small_corpus(tmp_path_factory.mktemp("demo"), 200)


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    config = demo_on(corpus, tmp_path / "run")
    return replace(config, heads=replace(config.heads, epochs=3, batch_size=64))


@pytest.mark.parametrize("features", ["cached", "live"])
def test_heads_compute_in_bf16_where_deepspeed_turns_autocast_off(features, config, monkeypatch):
    """As it does with a GPU's; the CPU's it does not ask for."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
    config = replace(
        config,
        heads=replace(config.heads, features=features, batch_size=32),
        engine=EngineConfig(precision="bf16"),
    )
    stage = stage_of(Heads, config)
    dtypes = collections.Counter()
    for module in stage.engine._module.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.dtype == torch.float32
            module.register_forward_hook(lambda *of: dtypes.update([of[-1].dtype]))
    ((batch,), *_) = stage.micro_batches(stage.plan(0)[:1], 0)
    stage.train_on(batch)
    assert set(dtypes) == {torch.bfloat16}
    stage.engine.close()


STEPS = [
    *(
        (Finetune, "linear", zero_stage, precision)
        for zero_stage in (0, 1, 2)
        for precision in ("bf16", "fp32")
    ),
    *((Finetune, "lstm", 0, precision) for precision in ("bf16", "fp32")),
    (Pretrain, "linear", 0, "bf16"),
    *((Heads, head, 0, precision) for head in ("linear", "lstm") for precision in ("bf16", "fp32")),
]


@pytest.mark.parametrize(("kind", "head", "zero_stage", "precision"), STEPS)
def test_a_step_reads_nothing_back(kind, head, zero_stage, precision, config, monkeypatch):
    changed = {
        "tasks": {name: replace(task, max_rows=100) for name, task in paper_tasks(head).items()},
        "engine": EngineConfig(precision=precision, zero_stage=zero_stage),
        "finetune": TaskStageConfig(batch_size=40),
        "heads": HeadsConfig(batch_size=100),
    }
    stage = stage_of(kind, replace(config, **changed))
    stage.engine.train()
    batches = [batches for batches in stage.micro_batches(stage.plan(0)[:3], 0)]
    stage.step(batches[0][0])  # DeepSpeed sets up its buffers
    for name in ("cpu", "numpy", "tolist"):  # of a tensor on the CPU they are no operations
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name: pytest.fail(f"{name}() reads back"))
    with ReadBack() as mode:
        for (batch,) in batches[1:]:
            stage.engine.set_learning_rate(1e-4)
            stage.step(batch)
    assert not mode.found
    monkeypatch.undo()
    stage.engine.close()


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
    files = list((config.path / "features").rglob("*.bin"))
    assert len(files) == (4 if of_lstm else 2)
    assert torch.equal(in_file.table.cls, in_memory.table.cls)
    (batch,) = next(in_file.micro_batches(in_file.plan(0)[:1], 0))
    whole = in_memory.table.select(batch.by_task(batch.numbers))
    monkeypatch.setattr(type(in_file.table), "resident", False)  # as if the heads were on another device
    part = in_file.table.select(batch.by_task(batch.numbers))
    assert len(part.cls) < len(whole.cls)
    for task, rows in part.sequences.items():
        assert torch.equal(part.cls[rows], whole.cls[whole.sequences[task]])
    assert list(part.token_bounds) == list(whole.token_bounds) == of_lstm
    for task in of_lstm:
        bounds = (features.token_bounds[task].tolist() for features in (part, whole))
        for (b, e), (begin, end) in zip(*bounds, strict=True):
            assert torch.equal(part.tokens[b:e], whole.tokens[begin:end])
