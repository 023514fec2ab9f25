"""200 steps of each stage in float32 against recorded losses; run as a program, this records them anew."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bert_twins import small_corpus
from stages import demo_on

from mtfast.commands import train
from mtfast.config import STAGES, RunConfig, StageConfig

RECORD = Path(__file__).with_name("loss_curves.json")
STEPS = 200
# Relative, of any loss. At this rate rounding does not grow: torch, oneDNN and MKL without AVX and this
# package's own generic code, or two threads for one, move a loss by 9e-7 at most. The smallest of the faults
# below moves one by 1.1e-3 within 50 steps, a whole pre-training without weight decay by 7.5e-4.
TOLERANCE = 2e-5

Curve = dict[str, dict[str, float]]


def settings(config: RunConfig) -> RunConfig:
    def short(stage: StageConfig, batch_size: int, learning_rate: float) -> StageConfig:
        return replace(
            stage,
            epochs=STEPS,
            max_steps=STEPS,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule="linear",
            warmup_fraction=0.1,
            weight_decay=0.1,
            gradient_clipping=1.0,
            checkpoint_every="1 hour",
        )

    return replace(
        config,
        log_every=STEPS,
        pretrain=short(config.pretrain, 8, 3e-4),
        heads=short(config.heads, 16, 3e-3),
        finetune=short(config.finetune, 16, 3e-4),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def curves_of(config: RunConfig) -> dict[str, Curve]:
    """The losses of every tenth step, and the first, by stage and step."""
    with one_thread():
        for stage in config.stages:
            train(config, stage)
    found: dict[str, Curve] = {stage: {} for stage in config.stages}
    for line in (config.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "step" and (record["step"] % 10 == 0 or record["step"] == 1):
            losses = {**record["losses"], "total": record["loss"]}
            found[record["stage"]][str(record["step"])] = {
                name: float(f"{x:.7g}") for name, x in losses.items()
            }
    return found


def furthest(found: Curve, recorded: Curve) -> float:
    """The largest relative difference of a loss."""
    assert found.keys() == recorded.keys()
    return max(
        abs(found[step][name] - value) / abs(value)
        for step, losses in recorded.items()
        for name, value in losses.items()
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    directory = tmp_path_factory.mktemp("curves")
    return settings(demo_on(small_corpus(directory / "corpus", 150), directory / "run"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Curve]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_each_stage_follows_its_recorded_losses(config, recorded):
    found = curves_of(config)
    assert found.keys() == recorded.keys() == set(STAGES)
    assert all(len(curve) == 1 + STEPS // 10 for curve in found.values())
    assert {stage: furthest(curve, recorded[stage]) for stage, curve in found.items()} == {
        stage: pytest.approx(0.0, abs=TOLERANCE) for stage in STAGES
    }
    for stage, loss in (("pretrain", "mlm"), ("heads", "sts"), ("finetune", "sts")):  # they do learn
        assert found[stage][str(STEPS)][loss] < 0.9 * found[stage]["1"][loss]


def stage_with(config: RunConfig, **values: float) -> RunConfig:
    return replace(config, finetune=replace(config.finetune, **values))


FAULTS = {
    "a learning rate 1% too high": lambda config: stage_with(
        config, learning_rate=1.01 * config.finetune.learning_rate
    ),
    "no weight decay": lambda config: stage_with(config, weight_decay=0.0),
    "a loss that counts 1% more": lambda config: replace(
        config, tasks=config.tasks | {"quora": replace(config.tasks["quora"], weight=1.01)}
    ),
    "a dropout of 0.11": lambda config: replace(config, model=replace(config.model, dropout_p=0.11)),
}


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> RunConfig:
    """A quarter of the last stage, from random weights."""
    run_dir = str(tmp_path_factory.mktemp("alone") / "run")
    return stage_with(replace(config, run_dir=run_dir, stages=("finetune",)), max_steps=STEPS // 4)


@pytest.fixture(scope="module")
def sound(alone) -> Curve:
    return curves_of(alone)["finetune"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_small_fault_is_far_beyond_the_tolerance(fault, alone, sound, tmp_path):
    faulty = FAULTS[fault](replace(alone, run_dir=str(tmp_path / "run")))
    assert furthest(curves_of(faulty)["finetune"], sound) > 10 * TOLERANCE


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        corpus = small_corpus(Path(directory, "corpus"), 150)
        curves = curves_of(settings(demo_on(corpus, Path(directory, "run"))))
    RECORD.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
