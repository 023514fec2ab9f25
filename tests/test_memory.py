"""Memory: a stage that has ended leaves none behind, and each stage's peak is its own."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bert_twins import small_corpus
from stages import demo_on

from mtfast import commands
from mtfast.config import STAGES
from mtfast.training.engine import memory, peak_memory, ranks

BLOCK = 256 << 20  # bytes, many times what else a small stage takes


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.fixture
def no_collections():
    """Cycles stay until they are collected on purpose."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def config(tmp_path):
    """Of a run of few steps."""
    config = demo_on(small_corpus(tmp_path / "demo", 60), tmp_path / "run")
    return replace(
        config,
        pretrain=replace(config.pretrain, max_steps=2),
        heads=replace(config.heads, epochs=1),
        finetune=replace(config.finetune, max_steps=2),
    )


@pytest.mark.usefixtures("no_collections")
def test_stages_in_one_process_take_what_each_takes_alone(config, monkeypatch):
    for name in STAGES:  # what they import stays
        commands.train(replace(config, run_dir=f"{config.run_dir}-before"), name)
    build, refs = commands._build, {}

    def build_large(config, run, name):
        stage = build(config, run, name)
        engine = stage.engine.model
        engine.module.block = np.ones(BLOCK // 8)
        parameter = next(engine.module.parameters())
        refs[name] = list(map(weakref.ref, (stage, stage.engine, engine, engine.module, parameter)))
        return stage

    monkeypatch.setattr(commands, "_build", build_large)
    before = resident()
    for name in STAGES:
        commands.train(config, name)
        assert [ref() for ref in refs[name]] == [None] * 5
        assert resident() < before + BLOCK / 2
    stages = json.loads((config.path / "summary.json").read_text())["stages"]
    for name in STAGES:
        assert before + BLOCK * 0.9 < stages[name]["peak_rss_bytes"] < before + BLOCK * 1.75


def test_what_a_command_has_freed_goes_back_to_the_system():
    memory.keep_freed()  # as `start` does on a CPU

    @memory.leaving_none
    def work(size: int) -> float:
        rows = [np.ones(size // 800) for _ in range(100)]
        cycle: list[object] = [rows]
        cycle.append(cycle)
        return float(rows[-1].sum())

    before = resident()
    assert work(BLOCK) == BLOCK // 800
    assert resident() < before + BLOCK / 4


def test_a_peak_is_of_what_came_after_the_reset():
    memory.return_freed()
    peak_memory.reset()
    before = resident()
    block = np.ones(BLOCK // 8)
    del block
    assert peak_memory.measured()["peak_rss_bytes"] > before + 0.9 * BLOCK
    memory.return_freed()
    peak_memory.reset()
    assert peak_memory.measured()["peak_rss_bytes"] < before + BLOCK / 2


def test_the_peak_is_that_of_the_rank_with_the_largest(monkeypatch):
    most = 1 << 60
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, dict.fromkeys(mine, most)])
    assert set(peak_memory.measured().values()) == {most}


def test_a_system_that_resets_or_tells_no_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path)
    (tmp_path / "clear_refs").mkdir()  # nothing that can be written
    peak_memory.reset()
    assert "peak_rss_bytes" not in peak_memory.measured()
    (tmp_path / "status").write_text("VmPeak:\t 900 kB\nVmHWM:\t     100 kB\nVmRSS:\t  90 kB\n")
    assert peak_memory.measured()["peak_rss_bytes"] == 100 << 10  # of the whole process
