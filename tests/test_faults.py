"""Disks that fail and processes that are killed, at every change to a run's files: nothing is lost."""

import errno
import json
import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import faults
import faulty
import pytest
from bert_twins import small_corpus
from processes import Ranks
from stages import demo_on

from mtfast.config import EngineConfig, RunConfig
from mtfast.data.demo import DemoCorpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"), 40)


class Case(NamedTuple):
    precision: str
    zero_stage: int
    world_size: int


CASES = {
    "fp32": Case("fp32", 0, 1),
    "bf16": Case("bf16", 0, 1),
    "fp32-two-ranks": Case("fp32", 2, 2),
    "bf16-two-ranks": Case("bf16", 1, 2),
}
KILLS = {"fp32": 8, "bf16": 8, "fp32-two-ranks": 7, "bf16-two-ranks": 7}  # 30


def run_of(case: Case, corpus: DemoCorpus, run_dir: Path) -> RunConfig:
    """All stages, a few steps each, with dropout; a state is saved every other step."""
    config = demo_on(corpus, run_dir)
    often = {"checkpoint_every": "2 steps", "batch_size": 16}
    return replace(
        config,
        log_every=1,
        engine=EngineConfig(precision=case.precision, zero_stage=case.zero_stage),
        pretrain=replace(config.pretrain, max_steps=6, **often),
        heads=replace(config.heads, epochs=2, max_steps=6, **often),
        finetune=replace(config.finetune, epochs=2, max_steps=6, **often),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(name, corpus, tmp_path):
    """Between writes and in the middle of one, in every stage, again and again."""
    case, draw = CASES[name], random.Random(name)

    def started(config: RunConfig, number: int | None) -> Ranks:
        return Ranks(
            faulty.train_stages, config, number, output=tmp_path / "said", world_size=case.world_size
        )

    whole = run_of(case, corpus, tmp_path / "whole")
    started(whole, None).succeed()
    expected = faulty.left_by(whole.path)
    changes = int(whole.path.with_suffix(".changes").read_text())
    kills, config = 0, run_of(case, corpus, tmp_path / "killed")
    while True:
        killing = kills < KILLS[name]
        ranks = started(config, draw.randint(1, changes // 3) if killing else None)
        status = ranks.processes[0].join() or ranks.processes[0].exitcode
        if status == -signal.SIGKILL:
            ranks.kill()
            ranks.wait()
            kills += 1
            continue
        ranks.succeed()
        found = faulty.left_by(config.path)
        assert found.keys() == expected.keys() and all(found[key] == x for key, x in expected.items())
        if not killing:
            break
        shutil.rmtree(config.path)  # it has ended before it was killed often enough


def test_what_is_named_is_on_the_disk_first(tmp_path):
    """As a loss of power needs it: what a rename puts in place is synced before it, file by file and the
    directory; the name itself after it, before anything older is removed."""
    changes = tmp_path / "changes"
    Ranks(faulty.list_changes, tmp_path / "run", changes, output=tmp_path).succeed()
    unsynced: set[Path] = set()  # files with contents, and directories with names, that are not on the disk
    synced: set[Path] = set()
    renamed: dict[Path, Path] = {}  # by the directory that does not have the name on the disk yet
    for line in changes.read_text().splitlines():
        what, path, of = (Path(part) if part.startswith("/") else part for part in line.split("\t"))
        if what == "fsync":
            unsynced.discard(path)
            synced.add(path)
            renamed.pop(path, None)
        elif what in ("open", "write") and not path.name.startswith(".tmp"):  # safetensors renames it
            unsynced |= {path}
        elif what in ("mkdir", "link"):
            unsynced |= {path, path.parent} if what == "mkdir" else {path.parent}
        elif what == "unlink":
            unsynced.discard(path)
            if not any(part.startswith(".") for part in path.parts):
                assert not renamed, (line, renamed)
        elif what == "rename" and not path.name.endswith(".outgoing"):
            left = {file for file in unsynced if file == of or of in file.parents}
            assert not left, (line, left)
            renamed[path.parent] = path
    state = tmp_path / "run" / "finetune" / "state"
    for file in (state / "step-16").rglob("*"):
        assert state / ".step-16.incoming" / file.relative_to(state / "step-16") in synced
    names = {path.name for path in (tmp_path / "run" / "finetune").iterdir()}
    assert not renamed and {"state", "best-mean", "best-sst", "last", "result.json"} <= names


@pytest.mark.parametrize(
    ("mode", "error", "stride"),
    [
        (faults.FAIL_FROM, errno.EIO, 31),
        (faults.FAIL_ONCE, errno.ENOSPC, 37),
        (faults.FAIL_FROM, errno.EROFS, 101),
    ],
    ids=["no more is written", "full for a moment", "read-only from then on"],
)
@pytest.mark.sweep
def test_whichever_change_fails_the_run_goes_on_as_if_it_had_not(mode, error, stride, tmp_path, full_sweep):
    numbers = range(1, 10_000, 1 if full_sweep else stride)
    Ranks(faulty.at_every_change, tmp_path, numbers, mode, error, output=tmp_path).succeed()
    said = json.loads((tmp_path / "errors.json").read_text())
    reason = errno.errorcode[error], r"No space left|Input/output error|Read-only"
    assert all(text == "" or re.search(reason[1], text) for text in said.values()), said
    if mode == faults.FAIL_FROM:
        assert all(said.values())
