"""A run by its directory: what commands read from it, and with which other settings it goes on."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from bert_twins import small_corpus
from following import flags

from mtfast import cli
from mtfast.commands import open_directory
from mtfast.config import ConfigError, RunConfig, to_dict
from mtfast.files import read_json, to_yaml, write_json
from mtfast.recipes import demo, paper
from mtfast.training.run.directory import RunDirectory, compare
from mtfast.training.run.lock import release
from mtfast.training.run.settings import FREE, PLACES, SHARING, Change, changes, located


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus") / "demo"
    small_corpus(directory, 150)
    return directory


def options(corpus: Path, run_dir: Path, **more: object) -> list[str]:
    values = {
        "run-dir": run_dir,
        "model.checkpoint": corpus / "bert",
        "data.tasks": corpus,
        "data.reviews": corpus / "imdb",
        "finetune.schedule": "constant",
        "finetune.warmup-fraction": 0,
        "finetune.batch-size": 64,
        "finetune.epochs": 2,
        "log-every": 2,
        **more,
    }
    return ["--stages", "finetune", *flags(values)]


def records(run_dir: Path, kind: str) -> list[tuple[int, object]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step": "losses", "eval": "metrics"}[kind]
    return [(record["step"], record[wanted]) for record in found if record["kind"] == kind]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """Two epochs without a break."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    cli.main(["run", "demo", *options(corpus, run_dir)])
    return run_dir


def copy_of(run: Path, directory: Path) -> Path:
    return shutil.copytree(run, directory / "copy")


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_finished_run_goes_on_with_more_epochs_as_if_it_had_them_from_the_start(
    corpus, whole, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    cli.main(["run", "demo", *options(corpus, run_dir, **{"finetune.epochs": 1})])
    half = len(records(run_dir, "step"))
    assert records(run_dir, "step") == records(whole, "step")[:half] and half > 3
    capsys.readouterr()
    cli.main(["resume", str(run_dir), "--finetune.epochs", "2", "--log-every", "1"])
    said = capsys.readouterr().out
    assert f"continuing after step {half} of {2 * half}" in said
    assert "goes on with another setting, finetune.epochs: 1 there, 2 here\n" in said
    for kind in ("step", "eval"):
        assert records(run_dir, kind) == records(whole, kind)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (run_dir, whole)]
    assert summaries[0]["dev"] == summaries[1]["dev"] and "changes" not in summaries[1]
    assert summaries[0]["changes"] == [
        {"field": "finetune.epochs", "was": 1, "now": 2, "at": {"finetune": half}}
    ]
    for file in ("sst-test-output.csv", "sts-dev-output.csv"):
        assert (run_dir / "predictions" / file).read_text() == (whole / "predictions" / file).read_text()
    assert "Continued with other settings" in (run_dir / "report.md").read_text()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["finetune"]["epochs"] == 2


def test_a_run_that_goes_on_with_the_same_settings_has_nothing_to_do(whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    cli.main(["resume", str(whole), "--log-every", "1", "--finetune.checkpoint-every", "3 steps", "--strict"])
    said = capsys.readouterr().out
    assert "finetune: already finished" in said and "another setting" not in said
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--finetune.learning-rate", "0.5"], "finetune.learning_rate: 0.001 there, 0.5 here"),
        (["--seed", "1"], "seed: 0 there, 1 here"),
        (["--tasks.sts.weight", "3"], "tasks.sts.weight: 1.0 there, 3.0 here"),
        (
            ["--finetune.epochs", "1"],
            r"finetune.epochs: 2 there, 1 here, and finetune is in epoch 2, after step ",
        ),
        (
            ["--finetune.max-steps", "2"],
            r"finetune.max_steps: None there, 2 here, and finetune is in epoch 2, after step ",
        ),
        (
            ["--stages", "pretrain", "finetune"],
            "stages: ['finetune'] there, ['pretrain', 'finetune'] here, and finetune has begun",
        ),
    ],
)
@pytest.mark.parametrize("command", ["resume", "predict"])
def test_what_changes_results_is_named_with_both_values(whole, changed, said, command, capsys):
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    found = refusal([command, str(whole), "--log-every", "7", *changed], capsys)
    assert said in found and "log_every" not in found
    assert {path: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


def test_a_stage_that_another_has_built_on_gets_no_more_epochs(corpus, whole, tmp_path, capsys):
    run = copy_of(whole, tmp_path)
    (run / "finetune").rename(run / "heads")
    (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl").read_text().replace('"finetune"', '"heads"'), encoding="utf-8"
    )
    config = located(replace(demo(), run_dir=str(run)))
    values = yaml.safe_load((run / "config.yaml").read_text()) | {"heads": to_dict(config)["heads"]}
    (run / "config.yaml").write_text(to_yaml(values), encoding="utf-8")
    values["heads"] = {**values["heads"], "epochs": 50}
    assert compare(run, values, create=True)  # it is the last one
    shutil.rmtree(run / "heads" / "state")
    with pytest.raises(ConfigError, match="50 here, and heads has finished and kept no state to go on from"):
        compare(run, values, create=True)
    (run / "finetune").mkdir()
    with pytest.raises(ConfigError, match="50 here, and finetune has begun with what heads left"):
        compare(run, values, create=True)


def test_a_copy_elsewhere_predicts_and_evaluates_what_the_run_does(whole, tmp_path, monkeypatch, capsys):
    run = copy_of(whole, tmp_path)
    shutil.rmtree(run / "predictions")
    monkeypatch.chdir(tmp_path)
    cli.main(["predict", "copy"])
    ours, theirs = (sorted((path / "predictions").iterdir()) for path in (run, whole))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    capsys.readouterr()
    cli.main(["evaluate", "copy"])
    dev = json.loads((whole / "summary.json").read_text())["dev"]
    assert capsys.readouterr().out == "".join(f"dev {name} {value:.4f}\n" for name, value in dev.items())
    cli.main(["report", "copy"])
    assert (run / "report.html").is_file()


def test_texts_of_a_file_are_predicted_from_another_directory(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a fine film .\na dull film .\n", encoding="utf-8")
    cli.main(["predict", str(whole), "--task", "sst", "--input", "texts.txt", "--output", "-"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("\t")[:2] == ["id", "label"] and len(rows) == 2
    assert not list(tmp_path.glob("*/"))
    assert "--task and --output are for predictions of --input" in refusal(
        ["predict", str(whole), "--task", "sst"], capsys
    )


def test_the_same_data_may_lie_elsewhere_and_other_data_may_not(corpus, whole, tmp_path, capsys):
    run, moved = copy_of(whole, tmp_path), tmp_path / "moved"
    shutil.copytree(corpus, moved)
    there = ["--data.tasks", str(moved), "--data.reviews", str(moved / "imdb"), "--data.cache-dir"]
    cli.main(["resume", str(run), *there, str(tmp_path / "cache"), "--finetune.epochs", "3"])
    assert f"data.tasks: '{corpus}' there, '{moved}' here" in capsys.readouterr().out
    assert max(step for step, _ in records(run, "step")) == 1.5 * len(records(whole, "step"))

    other = shutil.copytree(moved, tmp_path / "other")
    lines = other / "sst-dev.csv" if (other / "sst-dev.csv").exists() else other / "ids-sst-dev.csv"
    text = lines.read_text(encoding="utf-8")
    lines.write_text(text[: text.rstrip("\n").rindex("\n") + 1], encoding="utf-8")
    before = (run / "config.yaml").read_bytes()
    for command, *more in (["evaluate"], ["resume", "--finetune.epochs", "4"]):
        found = refusal([command, str(run), "--data.tasks", str(other), *more], capsys)
        assert f"the dev data of sst in {other} is not what the run in {run} has read in finetune" in found
    assert (run / "config.yaml").read_bytes() == before and (run / "finetune" / "result.json").is_file()


def test_another_checkpoint_is_told_by_its_weights(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = options(corpus, run_dir, **{"finetune.max-steps": 2, "finetune.checkpoint-every": "1 step"})
    cli.main(["finetune", "demo", *arguments])
    first = run_dir / "finetune" / "last"
    second = tmp_path / "second"
    begun = options(
        first, second, **{"model.checkpoint": first, "data.tasks": corpus, "finetune.max-steps": 2}
    )
    cli.main(["finetune", "demo", "--model.no-from-scratch", *begun])
    moved = shutil.copytree(first, tmp_path / "moved")
    longer = ["--finetune.max-steps", "3"]
    cli.main(["finetune", str(second), "--model.checkpoint", str(moved), *longer])
    assert "continuing after step 2 of 3" in capsys.readouterr().out
    weights = moved / "model.safetensors"
    other = bytearray(weights.read_bytes())
    other[-5] ^= 1
    weights.write_bytes(other)
    found = refusal(["finetune", str(second), "--finetune.max-steps", "4"], capsys)
    assert f"the checkpoint {moved} is not what the run in {second} has read in finetune" in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resume", "demo"], "resume needs the directory of a run, and demo is none"),
        (["resume"], "resume needs the directory of a run"),
        (["evaluate", "."], ". holds no run: there is no config.yaml in it"),
        (["push", "demo", "a/b"], "push needs the directory of a run, and demo is none"),
    ],
)
def test_what_is_no_run(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refusal(arguments, capsys) == f"mtfast: {said}\n"


def test_an_experiment_is_known_by_its_directory(tmp_path, capsys):
    """Wherever that lies now, with those of its runs beside it."""
    (tmp_path / "with-pretraining" / "seed-1").mkdir(parents=True)
    experiment = tmp_path / "exp1"
    experiment.mkdir()
    (experiment / "config.yaml").write_text("recipe: exp1\nrun_dir: /elsewhere\nseeds: 2\n", encoding="utf-8")
    cli.main(["report", str(experiment)])
    assert capsys.readouterr().out.count("wrote ") == 2
    assert (experiment / "report.md").exists() and (tmp_path / "with-pretraining/seed-1/report.md").exists()
    text = refusal(["predict", str(experiment), "--input", "-"], capsys)
    assert f"{experiment} has several runs; name one of " in text and "with-pretraining/seed-0" in text
    text = refusal(["report", str(tmp_path)], capsys)
    none = f"{tmp_path} holds no run: there is no config.yaml in it"
    assert text == f"mtfast: {none}; name one of {experiment}\n"


def test_paths_that_are_there_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    tasks = {"sst": replace(paper().tasks["sst"], source="tasks/sst-{split}.csv")}
    config = replace(paper(), run_dir="run", tasks=paper().tasks | tasks)
    found = located(replace(config, data=replace(config.data, tasks="tasks", cache_dir="cache")))
    assert (found.run_dir, found.data.tasks) == (f"{tmp_path}/run", f"{tmp_path}/tasks")
    assert found.tasks["sst"].source == f"{tmp_path}/tasks/sst-{{split}}.csv"
    assert found.data.cache_dir == f"{tmp_path}/cache"
    assert (found.model.checkpoint, found.data.reviews) == ("bert-base-uncased", "stanfordnlp/imdb")
    assert found.tasks["quora"].source is None and located(found) == found


def test_a_name_that_is_too_long_for_a_path_is_left_as_it_is():
    config = replace(paper(), model=replace(paper().model, checkpoint="a" * 300))
    assert located(config).model == config.model


def test_a_task_may_be_called_like_a_setting_of_tasks():
    def values(title: str) -> dict:
        return to_dict(replace(paper(), tasks={"splits": replace(paper().tasks["sst"], title=title)}))

    assert list(changes(values("a"), values("b"))) == [Change("tasks.splits.title", "a", "b")]


def test_a_run_of_a_version_without_a_setting_did_as_its_default_does(tmp_path, capsys):
    config = located(replace(demo(), run_dir=str(tmp_path / "run")))
    RunDirectory(config.path, to_dict(config)).stage("heads").mkdir()
    release()
    older = to_dict(config)
    del older["pretrain"]["head_steps"], older["heads"]["features"], older["tasks"]["sst"]["max_rows"]
    file, summary = tmp_path / "run" / "config.yaml", tmp_path / "run" / "summary.json"
    file.write_text(to_yaml(older))
    os.utime(file, ns=(10**18, 10**18))
    write_json(summary, read_json(summary, "") | {"config": older})
    assert not RunDirectory(config.path, to_dict(config)).changes
    assert capsys.readouterr().out == "" and yaml.safe_load(file.read_text()) == to_dict(config)
    assert file.stat().st_mtime_ns == 10**18
    release()
    write_json(summary, read_json(summary, "") | {"config": older})
    new = to_dict(replace(config, heads=replace(config.heads, features="live")))
    with pytest.raises(ConfigError, match=r":\n  heads.features: 'cached' there, 'live' here\n"):
        RunDirectory(config.path, new)


def test_every_setting_that_may_differ_is_a_setting():
    found = [Change(name, None, None) for name in flat(to_dict(paper()))]
    for pattern in FREE + PLACES + SHARING:
        assert any(change.is_one_of((pattern,)) for change in found), pattern


def flat(values: dict, prefix: str = "") -> dict:
    """Every leaf by its dotted name."""
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key not in ("splits", "aliases")
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def test_a_setting_that_no_list_has_may_not_differ(tmp_path):
    config = replace(demo(), run_dir=str(tmp_path / "run"))
    run = open_directory(config)
    run.append([{"kind": "step", "stage": "finetune", "step": 1, "epoch": 0, "losses": {}}])
    changed: RunConfig = replace(config, engine=replace(config.engine, precision="bf16"))
    with pytest.raises(ConfigError, match=r"engine\.precision: 'fp32' there, 'bf16' here"):
        open_directory(changed)
    open_directory(replace(config, engine=replace(config.engine, activation_checkpointing=True))).adopt()
    assert "activation_checkpointing: true" in (config.path / "config.yaml").read_text()


def test_a_learning_rate_that_follows_the_number_of_steps_is_told(tmp_path, capsys):
    config = replace(demo(), run_dir=str(tmp_path / "run"))
    open_directory(config).stage("finetune").mkdir()
    begun = (config.path / "config.yaml").stat().st_mtime_ns
    longer = replace(config, finetune=replace(config.finetune, epochs=20))
    open_directory(longer).adopt()
    said = (
        "finetune.epochs: 12 there, 20 here; the learning rate follows the new number of steps from here on"
    )
    assert said in capsys.readouterr().out
    assert not open_directory(longer).changes
    assert (config.path / "config.yaml").stat().st_mtime_ns == begun
