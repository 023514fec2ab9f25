"""Configuration files: what they mean, and what is said of those that cannot be meant."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mtfast import cli
from mtfast.config import to_dict, validate
from mtfast.config_file import read_config_file
from mtfast.data.demo import write_demo_corpus
from mtfast.experiments import ALL_RECIPES
from mtfast.files import to_yaml
from mtfast.recipes import PAPER_TASKS, demo, local
from mtfast.tasks import Task

IMDB = "imdb: {kind: binary, text: text, label: label, source: data/imdb, splits: {dev: test}, head: linear}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo-corpus")
    write_demo_corpus(directory)
    return directory


def written(directory: Path, text: str) -> Path:
    path = directory / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_recipe_and_what_differs_from_it(tmp_path):
    text = f"""\
recipe: local
seed: 7
engine: {{precision: fp32}}
finetune: {{learning_rate: 1e-4, epochs: 2}}
tasks:
  {IMDB}
  sts: {{weight: 0.25}}
  sst:
"""
    read = read_config_file(written(tmp_path, text), ALL_RECIPES)
    recipe = local()
    assert read.recipe == "local"
    imdb = Task(
        kind="binary", text="text", label="label", source="data/imdb", splits={"dev": "test"}, head="linear"
    )
    assert read.config == replace(
        recipe,
        seed=7,
        engine=replace(recipe.engine, precision="fp32"),
        finetune=replace(recipe.finetune, learning_rate=1e-4, epochs=2),
        tasks={"imdb": imdb, "sts": replace(PAPER_TASKS["sts"], weight=0.25), "sst": PAPER_TASKS["sst"]},
    )
    assert list(read.config.tasks) == ["imdb", "sts", "sst"]
    validate(read.config)


def test_a_task_that_gives_its_kind_takes_nothing_from_the_recipe(tmp_path):
    path = written(tmp_path, "tasks: {sst: {kind: binary, text: review, label: good}}")
    assert read_config_file(path, ALL_RECIPES).config.tasks == {"sst": Task("binary", "review", "good")}


@pytest.mark.parametrize("name", list(ALL_RECIPES))
def test_the_file_that_a_run_writes_is_one(tmp_path, name):
    config = ALL_RECIPES[name]()
    path = written(tmp_path, to_yaml(to_dict(config)))
    assert read_config_file(path, ALL_RECIPES).config == config


def test_the_command_line_overrides_a_file(tmp_path, capsys):
    path = written(tmp_path, f"recipe: demo\ntasks:\n  {IMDB}\n  sst:\n")
    overrides = ["--tasks.sst.weight", "0.5", "--tasks.imdb.max-rows", "4000", "--finetune.epochs", "2"]
    cli.main(["run", str(path), *overrides, "--print-config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["tasks"]["sst"]["weight"] == 0.5
    assert shown["tasks"]["imdb"]["max_rows"] == 4000
    assert shown["finetune"]["epochs"] == 2
    assert shown["run_dir"] == demo().run_dir


WRONG = {
    "no such recipe": (
        "recipe: lokal\n",
        "my.yaml:1: there is no recipe 'lokal'; the recipes are demo, local, best, paper, exp1, exp2",
    ),
    "a list of recipes": (
        "recipe: [local, demo]\n",
        "my.yaml:1: there is no recipe ['local', 'demo']; the recipes are demo, local, best, paper, exp1",
    ),
    "a number for yes": (
        "recipe: local\nfinetune:\n  epochs: yes\n",
        "my.yaml:3: finetune.epochs is True, as YAML reads yes, no, on and off; wanted is an integer",
    ),
    "an unknown field of a task": (
        "tasks:\n  imdb:\n    kind: binary\n    text: text\n    lable: label\n",
        "my.yaml:5: there is no field tasks.imdb.lable; did you mean label?",
    ),
    "an unknown section": (
        "recipe: local\nfintune: {epochs: 1}\n",
        "my.yaml:2: there is no field fintune; did you mean finetune?",
    ),
    "two tasks of one name": (
        f"tasks:\n  {IMDB}\n  sst:\n  {IMDB}\n",
        "my.yaml:4: two tasks are called 'imdb', the first in line 2; give each its own name",
    ),
    "a field that is missing": (
        "tasks:\n  sst:\n  imdb: {kind: binary, text: text}\n",
        "my.yaml:3: tasks.imdb has no label; a task needs kind, text and label",
    ),
    "a kind that is none": (
        "tasks:\n  imdb: {kind: sentiment, text: text, label: label}\n",
        "my.yaml:2: tasks.imdb.kind is 'sentiment'; it should be 'classification', 'binary' or 'regression'",
    ),
    "yes for one of several numbers": (
        "engine:\n  zero_stage: yes\n",
        "my.yaml:2: engine.zero_stage is True, as YAML reads yes, no, on and off; wanted is 0, 1, 2 or 3",
    ),
    "yes in a list of numbers": (
        "finetune:\n  betas: [0.9, no]\n",
        "my.yaml:2: finetune.betas is [0.9, False], as YAML reads yes, no, on and off; wanted is a list of 2",
    ),
    "a list that is too short": (
        "finetune:\n  betas: [0.9]\n",
        "my.yaml:2: finetune.betas is [0.9]; it must be two numbers in [0, 1)",
    ),
    "an integer too long for Python": ("\nseed: " + "1" * 5000, "my.yaml:2: not YAML: '1111"),
    "an integer too long for Python in hexadecimal": (
        "\nseed: 0x" + "f" * 5000,
        "my.yaml:2: seed is a number of thousands of digits; it must be an integer (of 64 bits)",
    ),
    "a day that is none": ("\nseed: 2024-13-45\n", "my.yaml:2: not YAML: '2024-13-45'"),
    "a tag that the value belies": ("\nseed: !!int x\n", "my.yaml:2: not YAML: 'x' cannot be read (invalid"),
    "a character that YAML has not": ("seed: 1\n# \x00\n", "my.yaml:2: not YAML: the character '\\x00'"),
    "lists without end": ("seed: " + "[" * 3000, "my.yaml:1: lists or sections are in one another too many"),
    "a section that holds itself": ("finetune: &a\n  epochs: *a\n", "my.yaml:2: finetune.epochs is {"),
    "lists that grow without bound": (
        "\n".join(
            ["seed:", "- &l0 [1]", *(f"- &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30))]
        ),
        "my.yaml:1: seed is [[1], [[",
    ),
    "the home of nobody": (
        "run_dir: ~nobody-of-that-name/x\n",
        "my.yaml:1: run_dir is '~nobody-of-that-name/x'; it must be a path or a name, without",
    ),
    "a bound that is no number": (
        "tasks:\n  sts:\n    low: -.inf\n",
        "my.yaml:3: tasks.sts.low is ",
    ),
    "a value of another type": (
        "recipe: local\nfinetune:\n  epochs: many\n",
        "my.yaml:3: finetune.epochs is 'many'; it should be a valid integer",
    ),
    "no YAML": ("recipe: local\ntasks: {sst: [}\n", "my.yaml:2: not YAML: "),
    "a list": ("- recipe: local\n", "my.yaml:1: [{'recipe': 'local'}]; a recipe's name and what differs is"),
    "a section that is a value": (
        "recipe: local\n\nengine: fp32\n",
        "my.yaml:3: engine is 'fp32'; it has fields, precision, zero_stage, ",
    ),
    "a head for pairs on one text": (
        "tasks:\n  imdb: {kind: binary, text: text, label: label,\n    head: lsmt}\n",
        "my.yaml:3: tasks.imdb.head is 'lsmt'; a task with one text has linear or lstm",
    ),
    "a linear head on separate pairs": (
        "tasks:\n  nli:\n    {kind: classification, classes: 3, text: [a, b], label: c}\n",
        "my.yaml:2: tasks.nli.head is linear, which takes one sequence; name an MLP for the pair "
        "(head: pair), or set pair_input: joint",
    ),
    "an MLP with pairs of two forms": (
        "tasks:\n  quora:\n  sts:\n    pair_input: joint\n",
        "my.yaml:4: tasks.sts.pair_input is joint, but it shares the head 'pair' with quora, whose pairs are "
        "separate; let them agree, or name another head for one",
    ),
    "a regression without its range": (
        "tasks:\n  sts: {kind: regression, text: [a, b], label: score, head: pair, low: 0}\n",
        "my.yaml:2: tasks.sts.high is not set; regression needs low and high, the lowest and the highest",
    ),
    "a metric of another kind": (
        "tasks:\n  quora: {metric: pearson}\n",
        "my.yaml:2: tasks.quora.metric is 'pearson'; kind binary has accuracy and f1",
    ),
    "a name that is taken": (
        "tasks:\n  sst:\n  mean: {kind: binary, text: text, label: label}\n",
        "my.yaml:3: tasks.mean is no name for a task: it is letters, digits and underscores, begins with a "
        "letter and is not mean or reviews",
    ),
    "no task": ("recipe: local\ntasks: {}\n", "my.yaml:2: tasks is empty; declare at least one task"),
    "a value out of range": (
        "recipe: local\nmodel: {dropout_p: 1.5}\n",
        "my.yaml:2: model.dropout_p is 1.5; it must lie in [0, 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_a_file_that_cannot_be_meant_is_answered_with_its_line(case, tmp_path, capsys):
    text, message = WRONG[case]
    path = written(tmp_path, text)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--print-config"])
    assert ended.value.code == 2
    assert f"mtfast: {tmp_path}/{message}" in capsys.readouterr().err


def test_a_name_too_long_for_a_file_is_no_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "a" * 300])
    assert "and no such file or directory" in capsys.readouterr().err


OF_DATA = {
    "a label column that is not there": (
        "sst: {label: mood}",
        "my.yaml:6: {corpus}/ids-sst-train.csv: no column 'mood'; columns found: '', 'id', 'sentence', ",
    ),
    "a text column that is not there": (
        "quora: {text: [one, two]}",
        "my.yaml:6: {corpus}/quora-train.csv: no column 'one'; columns found: ",
    ),
    "fewer classes than the labels have": (
        "sst: {classes: 3}",
        "my.yaml:6: {corpus}/ids-sst-train.csv: ",
    ),
    "a scale that the labels exceed": (
        "sts: {high: 3}",
        "my.yaml:6: {corpus}/sts-train.csv: ",
    ),
    "no source": (
        "imdb: {kind: binary, text: text, label: label}",
        "my.yaml:6: tasks.imdb.source is not set, and imdb is no task of the CS 224N files in data.tasks; ",
    ),
    "training data as dev data": (
        "imdb: {kind: binary, text: text, label: label, source: {corpus}/imdb, splits: {dev: train}}",
        "my.yaml:6: tasks.imdb.splits: 'train' would be train and dev data; what is trained on must not be ",
    ),
}


@pytest.mark.parametrize("case", list(OF_DATA))
def test_a_declaration_that_the_data_belies_is_answered_with_its_line(case, corpus, tmp_path, capsys):
    task, message = (text.replace("{corpus}", str(corpus)) for text in OF_DATA[case])
    head = f"recipe: local\nrun_dir: {tmp_path}/run\nmodel: {{checkpoint: {corpus}/bert}}\n"
    settings = f"data: {{tasks: {corpus}, max_length: 64, review_max_length: 64}}\n"
    path = written(tmp_path, f"{head}{settings}tasks:\n  {task}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", str(path), "--stages", "heads"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"mtfast: {tmp_path}/{message}" in error
    if "exceed" in case or "fewer" in case:
        assert "so tasks." in error and "should be another" in error


def test_what_the_command_line_says_is_not_blamed_on_the_file(corpus, tmp_path, capsys):
    settings = f"data: {{tasks: {corpus}, max_length: 64}}\nmodel: {{checkpoint: {corpus}/bert}}\n"
    path = written(tmp_path, f"recipe: local\n{settings}tasks:\n  sst: {{label: sentiment}}\n")
    with pytest.raises(SystemExit):
        cli.main(
            [
                "prepare",
                str(path),
                "--stages",
                "heads",
                "--tasks.sst.label",
                "mood",
                "--run-dir",
                f"{tmp_path}/r",
            ]
        )
    assert f"mtfast: {corpus}/ids-sst-train.csv: no column 'mood'" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_said_with_what_would_be(tmp_path, capsys):
    for name, message in (
        ("papr", "there is no recipe 'papr', and no such file"),
        ("my.yaml", "my.yaml: No such"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["run", name])
        assert message in capsys.readouterr().err
