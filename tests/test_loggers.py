"""What TensorBoard, Weights & Biases and a caller's function are told is what metrics.jsonl holds."""

import contextvars
import gc
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
import yaml
from bert_twins import small_corpus
from curves import Curves, curves_of, curves_of_rows, logged, read_events, records_of, rounded
from patience import PATIENCE
from processes import Ranks
from stages import demo_on
from without_loggers import not_logged_in, train_telling_loggers, without

import mtfast
from mtfast import cli, commands
from mtfast.config import ConfigError, RunConfig, StageConfig, validate
from mtfast.data.demo import DemoCorpus
from mtfast.files import read_json, to_yaml, write_json
from mtfast.training.run import loggers

PACKAGES = {"tensorboard", "wandb"}
VARIABLE = contextvars.ContextVar("VARIABLE", default="the caller's")


def read_tensorboard(run: Path) -> Curves:
    assert len(list((run / "tensorboard").iterdir())) == 1
    return read_events(run / "tensorboard")


class OfWandb(NamedTuple):
    """What is kept for `wandb sync`: about the run, the step metric of each glob, its rows."""

    run: Any
    step_metrics: dict[str, str]
    rows: list[dict[str, Any]]


def read_wandb(run: Path) -> OfWandb:
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + PATIENCE
    while not any(record.HasField("exit") for record in logged(file)):  # W&B's own process writes it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = OfWandb(None, {}, [])
    for record in logged(file):
        if record.HasField("run"):
            found = found._replace(run=record.run)
        elif record.HasField("metric") and record.metric.glob_name:
            found.step_metrics[record.metric.glob_name] = record.metric.step_metric
        elif record.HasField("history"):
            items = record.history.item
            found.rows.append({x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items})
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"), 40)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr(commands, "_report", lambda *_: None)  # plots take seconds
        yield


def short(corpus: DemoCorpus, run_dir: Path, **changes: Any) -> RunConfig:
    """Three epochs of fine-tuning, three steps each, after a little of the other stages."""

    def few(stage: Any, **more: Any) -> StageConfig:
        return replace(stage, batch_size=40, warmup_fraction=0.0, **more)

    config = demo_on(corpus, run_dir)
    return replace(
        config,
        data=replace(config.data, max_reviews=20),
        log_every=1,
        pretrain=few(config.pretrain, epochs=1, max_steps=3),
        heads=few(config.heads, epochs=1),
        finetune=few(config.finetune, epochs=3),
        **changes,
    )


class Part(NamedTuple):
    """What there was after each of two calls: lines of metrics.jsonl, events, and what the loggers have."""

    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    tensorboard: Curves
    wandb: OfWandb


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def parts(corpus, tmp_path_factory) -> tuple[Path, list[Part]]:
    """A run that a caller's error ends in step 5 of fine-tuning, and that the same call goes on with."""
    run = tmp_path_factory.mktemp("logged") / "run"
    config, parts = short(corpus, run, log=("tensorboard", "wandb")), []
    for fails in (True, False):
        events: list[dict[str, Any]] = []

        def on_event(event: dict[str, Any], fails: bool = fails, events: list = events) -> None:
            assert records_of(run)[-1] == event  # on the disk
            events.append(json.loads(json.dumps(event)))
            if fails and (event["stage"], event["step"]) == ("finetune", 5):
                raise Interrupted
            event.clear()  # is the caller's own

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(loggers, "say", pytest.fail)  # that W&B failed
            try:
                mtfast.train(config, on_event=on_event)
                assert not fails
            except Interrupted:
                assert fails
        parts.append(Part(records_of(run), events, read_tensorboard(run), read_wandb(run)))
    return run, parts


def test_a_callers_function_gets_the_lines_of_metrics_and_its_error_ends_the_run(parts):
    _, (first, second) = parts
    assert first.records == first.events
    assert [(e["stage"], e["kind"], e["step"]) for e in first.events[-4:]] == [
        ("finetune", "step", 3),
        ("finetune", "eval", 3),
        ("finetune", "step", 4),
        ("finetune", "step", 5),
    ]
    kept = first.records[:-2]  # after the newest state
    assert second.records == kept + second.events
    finetune = [(e["kind"], e["step"]) for e in second.records if e["stage"] == "finetune"]
    assert finetune == sorted(set(finetune), key=lambda x: (x[1], x[0] == "eval")) and len(finetune) == 12


def test_tensorboard_holds_every_number_once(parts):
    for part in parts[1]:
        assert part.tensorboard == rounded(curves_of(part.records))
    tags = {"loss", "loss/sts", "learning_rate", "examples_per_s", "tokens_per_s", "dev/sst_accuracy"}
    assert {f"finetune/{tag}" for tag in tags} | {"pretrain/loss/mlm", "heads/dev/mean"} <= set(
        parts[1][1].tensorboard
    )


def test_wandb_holds_every_number_once(parts):
    run, (first, second) = parts
    for part in (first, second):
        assert curves_of_rows(part.wandb.rows) == curves_of(part.records)
        assert [row["_step"] for row in part.wandb.rows] == list(range(len(part.records)))
        assert part.wandb.step_metrics == {f"{s}/*": f"{s}/step" for s in ("pretrain", "heads", "finetune")}
    about = second.wandb.run
    assert (about.project, about.display_name, about.run_id) == ("mtfast", run.name, first.wandb.run.run_id)
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["finetune"]["batch_size"] == 40 and config["run_dir"] == str(run)


def test_curves_that_are_asked_for_once_a_run_has_finished(parts, corpus, tmp_path, monkeypatch):
    """Of a run of a mtfast that had none."""
    monkeypatch.setattr(commands, "evaluate", lambda config: {})
    monkeypatch.setattr(commands, "predict", lambda config: [])
    run = shutil.copytree(parts[0], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard", "wandb*"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["log"]
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_json(run / "summary.json", read_json(run / "summary.json", "") | {"config": config})
    events: list[dict] = []
    mtfast.train(short(corpus, run, log=("tensorboard",)), on_event=events.append)
    assert read_tensorboard(run) == rounded(curves_of(parts[1][1].records)) and not events
    assert not (run / "wandb").exists()


STEP = {"kind": "step", "stage": "heads", "epoch": 0, "learning_rate": 0.1}
SKIPPED = {"kind": "skipped", "stage": "heads", "step": 2, "epoch": 0, "losses": {"sst": None, "sts": 2.0}}
EVAL = {"kind": "eval", "stage": "heads", "step": 3, "epoch": 1, "metrics": {"mean": 0.5}}
RECORDS = [
    {**STEP, "step": 1, "loss": 3.0, "losses": {"sst": 1.0, "sts": 2.0}},
    SKIPPED,
    {**STEP, "step": 3, "loss": 2.5, "losses": {"sst": 1.0, "sts": 1.5}},
    EVAL,
]


def test_an_evaluation_can_be_seen_at_once_and_a_skipped_step_too(tmp_path):
    config = RunConfig(run_dir=str(tmp_path), log=("tensorboard",))
    with loggers.opened(config, None) as (board,):
        board.restart([*RECORDS[:2], {**STEP, "step": 9, "loss": 9.0}])
        board.restart(RECORDS[:2])  # the last is taken back
        board.add(RECORDS[2:])
        assert read_tensorboard(tmp_path) == {
            "heads/loss": [(1, 3.0), (3, 2.5)],
            "heads/loss/sst": [(1, 1.0), (3, 1.0)],
            "heads/loss/sts": [(1, 2.0), (2, 2.0), (3, 1.5)],
            "heads/learning_rate": [(step, float(np.float32(0.1))) for step in (1, 3)],
            "heads/skipped": [(2, 1.0)],
            "heads/dev/mean": [(3, 0.5)],
        }


class AtWandb:
    """A run that W&B has the first rows of already, and whose connection breaks."""

    id, offline = "abc", False

    def __init__(self, rows: int, breaks_at: int) -> None:
        self.starting_step, self.breaks_at = rows, breaks_at
        self.rows: list[tuple[int, Any]] = []

    def define_metric(self, *_: Any, **__: Any) -> None:
        VARIABLE.set("W&B's")

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        assert VARIABLE.get() == "W&B's" and not gc.isenabled()
        if step == self.breaks_at:
            raise BrokenPipeError("the service\nis gone")
        self.rows.append((step, row.get("heads/step")))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.breaks_at >= 0:
            raise BrokenPipeError("the service is still gone")


def test_wandb_gets_what_it_lacks(tmp_path, monkeypatch):
    there, asked = AtWandb(3, -1), {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or there)
    config, ids = RunConfig(run_dir=str(tmp_path), log=("wandb",)), []
    for _ in range(2):
        with pytest.raises(Interrupted), loggers.opened(config, None) as (told,):
            told.restart(RECORDS[:2])  # W&B has one more, which comes again
            told.add(RECORDS[2:])
            raise Interrupted
        ids.append(asked["id"])
    assert there.rows == [(3, 3), (3, 3)] and there.exit_code == 1  # opened twice
    assert VARIABLE.get() == "the caller's"
    assert ids[0] == ids[1] and (asked["resume"], asked["reinit"]) == ("allow", "create_new")


def test_no_failure_of_wandb_ends_a_run(tmp_path, monkeypatch, capsys):
    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no such host")

    there = AtWandb(0, 2)
    config = RunConfig(run_dir=str(tmp_path), log=("wandb",))
    for init, said in ((fail, "no such host"), (lambda **_: there, "the service is gone")):
        monkeypatch.setattr(wandb, "init", init)
        with loggers.opened(config, None) as (told,):
            told.restart(RECORDS[:1])
            told.add(RECORDS[1:])
            told.restart(RECORDS)
        out = capsys.readouterr().out
        assert f"log wandb: {said}; the run goes on without it, and `mtfast resume {tmp_path}` " in out
        assert out.count("\n") == 1
    assert there.rows == [(0, 1), (1, 2)] and there.exit_code == 0  # tried all the same
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("logger", "lacks", "world_size", "needs", "remedy"),
    [
        (
            "tensorboard",
            "package",
            2,
            "needs the package tensorboard",
            "python -m pip install 'tensorboard>=",
        ),
        ("wandb", "package", 1, "needs the package wandb", "python -m pip install 'wandb>="),
        (
            "wandb",
            "login",
            1,
            "needs a login",
            "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
        ),
    ],
    ids=["no TensorBoard", "no W&B", "not logged in"],
)
def test_a_logger_that_cannot_be_used_is_refused_before_data_is_read(
    logger, lacks, world_size, needs, remedy, tmp_path
):
    """On all ranks; the data is not even there."""
    function, of = (without, logger) if lacks == "package" else (not_logged_in, str(tmp_path))
    command = ("run", "paper", "--log", logger, "--run-dir", "run", "--data.tasks", "none")
    ranks = Ranks(function, of, *command, output=tmp_path, world_size=world_size, cwd=tmp_path)
    assert ranks.wait() == [2] * world_size, ranks.stderr()
    said = "".join(map(ranks.stderr, range(world_size)))
    assert (
        said.count("mtfast: ") == 1 and f"mtfast: log {logger} {needs} (" in said and f"): {remedy}" in said
    )
    assert not (tmp_path / "run").exists()


def test_an_older_version_is_refused(monkeypatch):
    monkeypatch.setattr(loggers, "version_of", lambda name: "0.9.12")
    with pytest.raises(
        ConfigError, match=r"log wandb needs wandb \S+ or newer, 0\.9\.12 is installed: "
    ) as told:
        loggers.check(("wandb",))
    assert told.value.field == "log"


def test_nothing_is_imported_that_is_not_asked_for(corpus, tmp_path):
    config = replace(short(corpus, tmp_path / "run"), stages=("finetune",))
    ranks = Ranks(train_telling_loggers, config, output=tmp_path)
    ranks.succeed()
    assert ranks.stdout().splitlines()[-1] == "[]"
    assert not {path.name for path in (tmp_path / "run").iterdir()} & PACKAGES


def test_how_loggers_are_named(tmp_path, capsys):
    both = ["tensorboard", "wandb"]
    cli.main(["run", "demo", "--log", *both, "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["log"] == both
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: demo\nlog: [tensorboard, wandb]\n", encoding="utf-8")
    cli.main(["run", str(file), "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["log"] == both
    for names in (("wandb", "wandb"), ("mlflow",)):
        with pytest.raises(ConfigError, match="it must name some of tensorboard wandb, each once"):
            validate(replace(mtfast.recipes.demo(), log=names))
