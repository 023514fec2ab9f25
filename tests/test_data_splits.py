"""Which rows serve as which split: none serves twice, and the account says which files were joined."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from paper_tables import read_paper_task
from small_tokenizer import small_tokenizer

from mtfast.commands import prepare as prepare_run
from mtfast.config import ConfigError, DataConfig, RunConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.data.reviews import read_reviews
from mtfast.data.rows import DataError
from mtfast.recipes import PAPER_TASKS, RECIPES
from mtfast.training.inputs import load_task

ROWS = {"sentence": ["a", "b"], "label": [4, 0]}
CSV = "sentence,label\na,4\nb,0\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def prepare(corpus, tmp_path):
    """Prepares a run on the demo corpus with another directory of task files, or changes to the task sst."""
    demo = RECIPES["demo"]()
    model = replace(demo.model, checkpoint=str(corpus.bert))

    def prepared(tasks: Path = corpus.tasks, sst: Path | None = None, **changes) -> RunConfig:
        task = replace(demo.tasks["sst"], source=None if sst is None else str(sst), **changes)
        config = replace(
            demo,
            run_dir=str(tmp_path / "run"),
            tasks=demo.tasks | {"sst": task},
            model=model,
            data=replace(demo.data, tasks=str(tasks), reviews=str(corpus.reviews)),
            stages=("heads", "finetune"),
        )
        prepare_run(config)
        return config

    return prepared


def test_a_saved_data_set_without_splits_is_refused_for_tasks_and_read_for_reviews(prepare, tmp_path):
    single = datasets.Dataset.from_dict(ROWS)
    single.save_to_disk(str(tmp_path / "single"))
    with pytest.raises(
        ConfigError, match=r"tasks\.sst\.source is one data set without splits, .*single, which would be"
    ):
        prepare(sst=tmp_path / "single")
    assert len(read_reviews(tmp_path / "single")) == 2
    datasets.DatasetDict(train=single, validation=single).save_to_disk(str(tmp_path / "splits"))
    prepare(sst=tmp_path / "splits")


@pytest.mark.parametrize("pattern", [False, True])
def test_links_to_one_file_do_not_serve_as_two_splits(prepare, tmp_path, pattern):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text(CSV)
    (folder / "validation.csv").symlink_to(folder / "train.csv")
    with pytest.raises(
        ConfigError, match=r"tasks\.sst\.source: the train file .* and the dev file .* are one file"
    ):
        prepare(sst=folder / "{split}.csv" if pattern else folder)
    (folder / "validation.csv").unlink()
    (folder / "validation.csv").write_text(CSV)
    (folder / "test.csv").symlink_to(
        "validation.csv"
    )  # predictions for the dev rows: nothing learns from them
    prepare(sst=folder / "{split}.csv" if pattern else folder)


def test_links_between_course_files_are_refused(prepare, corpus, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in corpus.tasks.glob("*.csv"):
        (folder / file.name).symlink_to(file)
    prepare(tasks=folder)
    (folder / "sts-dev.csv").unlink()
    (folder / "sts-dev.csv").symlink_to("sts-train.csv")
    with pytest.raises(ConfigError, match=r"tasks\.sts\.source: the (train|dev) file .* are one file"):
        prepare(tasks=folder)


def test_files_of_no_task_do_not_serve_every_task(prepare, tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text("sentence1,sentence2,label\na,b,1\n")
    with pytest.raises(ConfigError, match=r"data\.tasks is .*, which holds no ids-sst-\*\.csv"):
        prepare(tasks=tmp_path)


@pytest.mark.parametrize("other", ["dev", "test"])
def test_one_name_for_training_and_other_data_is_refused(prepare, other):
    with pytest.raises(ConfigError, match=f"'train' would be train and {other} data; what is") as error:
        prepare(splits={other: "train"})
    assert error.value.field == "tasks.sst.splits"
    prepare(splits={"test": "dev"})  # nothing is trained on either


def test_only_the_courses_tasks_need_no_source(corpus):
    data = DataConfig(tasks=str(corpus.tasks))
    task = PAPER_TASKS["sst"]
    with pytest.raises(ConfigError, match="source is not set, and films is no task of the CS 224N") as error:
        load_task("films", task, data, small_tokenizer(), "train")
    assert error.value.field == "tasks.films"
    assert len(load_task("sst", task, data, small_tokenizer(), "train")) == 1500


def test_joined_files_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "train_old.csv", "data/train.csv"):
        (tmp_path / name).write_text(CSV)
    account = read_paper_task("sst", tmp_path).account
    assert account.read == 6
    assert account.notes == ("3 files joined: train.csv, train_old.csv, data/train.csv",)
    assert "\n  3 files joined: train.csv, train_old.csv, data/train.csv" in account.summary()
    assert read_reviews(tmp_path).account.notes == ("3 files read: train.csv, train_old.csv, data/train.csv",)


def test_files_that_might_have_been_meant_too_are_named(tmp_path):
    for name in ("dev.csv", "validation.csv", "valid-old.csv", "test.csv"):
        (tmp_path / name).write_text(CSV)
    for source in (tmp_path, f"{tmp_path}/{{split}}.csv"):
        account = read_paper_task("sst", source, "dev").account
        assert account.read == 2 and "also there, but not read: validation.csv" in account.notes[0]
    assert read_paper_task("sst", tmp_path, "test").account.notes == ()
    splits = {name: datasets.Dataset.from_dict(ROWS) for name in ("dev", "validation")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    account = read_paper_task("sst", tmp_path / "saved", "dev").account
    assert account.notes == ("also there, but not read: validation",)
    for name in ("test", "test-student"):
        (tmp_path / f"ids-sst-{name}.csv").write_text("id\tsentence\n0\ta\n")
    account = read_paper_task("sst", tmp_path, "test").account
    assert account.notes == ("also there, but not read: ids-sst-test.csv",)


def test_a_data_sets_unnamed_split_is_no_other_split(monkeypatch):
    named = {"train": datasets.Dataset.from_dict(ROWS), "": datasets.Dataset.from_dict(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: named)
    with pytest.raises(DataError, match="no dev split"):
        read_paper_task("sst", "owner/name", "dev")


def test_rows_are_not_read_twice(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "train_again.csv").symlink_to("train.csv")
    for read in (read_reviews, lambda source: read_paper_task("sst", source)):
        with pytest.raises(DataError, match=r"train\.csv and train_again\.csv are one file"):
            read(tmp_path)
    (tmp_path / "train_again.csv").unlink()
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "label": 4}\n')
    with pytest.raises(DataError, match=r"train\.csv and train\.jsonl differ in kind only"):
        read_reviews(tmp_path)
