"""Results in a report: on which split, of which epoch and how it was chosen, beside what other figures."""

import json
from dataclasses import replace

import pytest
from recorded_runs import FOUR_TASKS, add_to_summary, declaring, evaluation, markdown_of, table_row, write_run

from mtfast.comparison_report import write_comparison
from mtfast.experiments import EXPERIMENTS
from mtfast.recipes import PAPER_TASKS


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    for plot in ("report.plot_of_dev_metrics", "comparison_report.plot_dev_metrics"):
        monkeypatch.setattr(f"mtfast.{plot}", lambda *_: None)
    monkeypatch.setattr("mtfast.comparison_report.plot_comparison", lambda *_: None)


@pytest.fixture
def full_run(tmp_path):
    """Two epochs of head training, one of fine-tuning, evaluated on dev."""
    records = [evaluation("heads", 29, 1, 0.31, 0.61, 0.21), evaluation("heads", 59, 2, 0.30, 0.60, 0.20)]
    records.append(evaluation("finetune", 29, 1, 0.4567, 0.7654, 0.3456))
    stages = {"heads": {"steps": 60}, "finetune": {"steps": 30}}
    return write_run(tmp_path / "run", records, {"dev": records[-1]["metrics"], "stages": stages})


def test_the_choice_of_the_epoch_is_told(full_run):
    """Of the stage that the results are of, and what it means for the figures on dev."""
    assert "The results are those of the one epoch of fine-tuning.\n" in markdown_of(full_run)
    with open(full_run / "metrics.jsonl", "a") as file:
        for epoch in (2, 3, 4):
            record = evaluation("finetune", 30 * epoch - 1, epoch, 0.5 if epoch == 3 else 0.4, 0.7, 0.3)
            file.write(json.dumps(record) + "\n")
    add_to_summary(full_run, dev=evaluation("finetune", 89, 3, 0.5, 0.7, 0.3)["metrics"])
    markdown = markdown_of(full_run)
    said = (
        "The results are those of epoch 1 of 4 of fine-tuning, whose weights had the best mean of the tasks' "
        "metrics on dev. Figures on dev are therefore the best of 4 looks and tend to be high."
    )
    assert said in markdown and "on test" not in markdown.split("## Beside the paper")[0]
    assert table_row(markdown, "Fine-tuning, best epoch on dev")[0] == "1"


def test_results_of_head_training_while_fine_tuning_is_not_finished(full_run):
    """They were evaluated before fine-tuning began."""
    heads = evaluation("heads", 29, 1, 0.31, 0.61, 0.21)["metrics"]
    add_to_summary(full_run, dev=heads, stages={"heads": {"steps": 3}})
    assert "those of epoch 1 of 2 of head training, whose" in markdown_of(full_run)
    summary = json.loads((full_run / "summary.json").read_text())
    (full_run / "summary.json").write_text(json.dumps({**summary, "dev": None}))
    markdown = markdown_of(full_run)  # not evaluated: the best so far
    assert "those of the one epoch of fine-tuning." in markdown and "SST accuracy **0.457**" in markdown


def test_results_on_test_stand_beside_those_on_dev(full_run):
    assert table_row(markdown_of(full_run), "**This run (dev)**")[0] == "**0.457**"
    test = evaluation("", 0, 0, 0.44, 0.75, 0.33)["metrics"]
    add_to_summary(full_run, test=test)
    markdown = markdown_of(full_run)
    assert "STS Pearson **0.346**. On test: SST accuracy **0.440**, Quora accuracy **0.750**" in markdown
    assert table_row(markdown, "**Result on dev**")[1:4] == ["**0.457**", "**0.765**", "**0.346**"]
    found = ["**0.440**", "**0.750**", "**0.330**", f"**{test['mean']:.3f}**"]
    assert table_row(markdown, "**Result on test**")[1:5] == found
    assert "epoch of fine-tuning. Figures on test were used for no choice." in markdown
    assert table_row(markdown, "**This run (test)**") == found
    assert (
        "**This run (dev)**" not in markdown
        and "ours are on the test split of the run's own data" in markdown
    )


def test_results_on_test_of_some_tasks_have_no_mean(full_run):
    """And do not stand beside the paper's."""
    add_to_summary(full_run, test={"sst_accuracy": 0.44, "mean": 0.44})
    markdown = markdown_of(full_run)
    assert table_row(markdown, "**Result on test**") == ["", "**0.440**", *(["**—**"] * 4)]
    assert table_row(markdown, "**This run (dev)**")[0] == "**0.457**"
    assert "ours are on dev." in markdown


def test_settings_that_the_run_was_continued_with(full_run):
    assert "Continued with other settings" not in markdown_of(full_run)
    changes = [
        {"field": "finetune.epochs", "was": 3, "now": 5, "at": {"finetune": 1200, "heads": 40}},
        {"field": "heads.patience", "was": None, "now": 2, "at": {}},
    ]
    add_to_summary(full_run, changes=changes)
    markdown = markdown_of(full_run)
    assert "### Continued with other settings" in markdown
    assert table_row(markdown, "`finetune.epochs`") == ["3", "5", "step 1,200 of fine-tuning"]
    assert table_row(markdown, "`heads.patience`") == ["not set", "2", "the beginning"]


@pytest.mark.parametrize(
    ("changes", "comparable"),
    [
        ({}, True),
        ({"sts": replace(PAPER_TASKS["sts"], pair_input="joint", head="other", weight=0.5)}, True),
        ({"sst": replace(PAPER_TASKS["sst"], kind="binary", classes=None)}, False),
        ({"sst": replace(PAPER_TASKS["sst"], classes=2)}, False),
        ({"sts": replace(PAPER_TASKS["sts"], metric="spearman")}, False),
        ({"imdb": FOUR_TASKS["imdb"]}, False),
    ],
)
def test_the_papers_figures_stand_beside_the_papers_tasks_alone(tmp_path, changes, comparable):
    """However those are trained."""
    records = [evaluation("finetune", 1, 1, 0.4, 0.7, 0.4)]
    run = write_run(tmp_path / "run", records, config=declaring(PAPER_TASKS | changes))
    assert ("## Beside the paper" in markdown_of(run)) == comparable
    page = write_comparison({"LSTM head": [run]}, tmp_path, EXPERIMENTS["exp2"])
    markdown = (page.parent / "report.md").read_text()
    assert ("## Ours and the paper's" in markdown) == ("| Paper (test)" in markdown) == comparable
    assert table_row(markdown, "Ours (dev): LSTM head")[1] == "0.700"
