"""Experiments in numbers and as a page: spread over seeds, and the bootstrap against SciPy's."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from recorded_runs import (
    add_to_summary,
    evaluation,
    labels_of,
    predicted,
    table_row,
    write_four_task_run,
    write_outcomes,
    write_results,
    write_run,
)

from mtfast import comparison
from mtfast.comparison import compared
from mtfast.comparison_report import write_comparison
from mtfast.config import ConfigError
from mtfast.experiments import EXPERIMENTS
from mtfast.kinds import task_metrics
from mtfast.recipes import PAPER_TASKS, paper
from mtfast.run_record import outcomes_file, read_run

WITHOUT, WITH = "without pre-training", "with pre-training"


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 400)


@pytest.fixture
def results(tmp_path):
    """Run directories by variant, and the predictions and labels that they hold."""
    random = np.random.default_rng(5)
    labels = labels_of(random)
    made = {
        variant: [predicted(labels, random, quality) for _ in range(3)]
        for variant, quality in ((WITHOUT, 0.4), (WITH, 0.6))
    }
    runs = {
        variant: [
            write_results(tmp_path / variant / str(seed), replace(paper(), seed=seed), predictions, labels)
            for seed, predictions in enumerate(of_variant)
        ]
        for variant, of_variant in made.items()
    }
    return runs, made, labels


def records_of(runs):
    return {variant: [read_run(path) for path in of_variant] for variant, of_variant in runs.items()}


def test_means_and_spreads_are_over_seeds(results):
    runs, made, labels = results
    found = compared(EXPERIMENTS["exp1"], records_of(runs))["splits"]["dev"]["variants"]
    for variant, of_variant in made.items():
        assert found[variant]["seeds"] == [0, 1, 2]
        for key in ("sst_accuracy", "quora_accuracy", "sts_pearson", "mean"):
            values = [task_metrics(PAPER_TASKS, predictions, labels)[key] for predictions in of_variant]
            score = found[variant]["result"][key]
            assert score["values"] == values and score["mean"] == pytest.approx(np.mean(values))
            assert score["spread"] == pytest.approx(np.std(values, ddof=1))
        best, last = (found[variant][part]["sst_accuracy"]["mean"] for part in ("result", "last"))
        assert last == pytest.approx(best - 0.01)


def test_the_bootstrap_is_scipys(results, monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 3000)
    runs, made, labels = results
    found = compared(EXPERIMENTS["exp1"], records_of(runs))["splits"]["dev"]["difference"]
    for name, key in (("sst", "sst_accuracy"), ("sts", "sts_pearson")):

        def score(true, predictions, name=name):
            return np.corrcoef(true, predictions)[0, 1] if name == "sts" else np.mean(true == predictions)

        def apart(true, *predictions):
            scores = [score(true, of_run) for of_run in predictions]
            return np.mean(scores[3:]) - np.mean(scores[:3])

        columns = [labels[name], *(of_run[name] for variant in (WITHOUT, WITH) for of_run in made[variant])]
        theirs = scipy.stats.bootstrap(
            columns, apart, paired=True, vectorized=False, n_resamples=3000, method="percentile"
        ).confidence_interval
        ours = found[key]
        assert ours["mean"] == pytest.approx(apart(*columns), abs=1e-6)
        assert (ours["low"], ours["high"]) == pytest.approx(theirs, abs=0.006)
        assert ours["low"] < ours["mean"] < ours["high"] and 0 < ours["p"] < 0.01
    assert found["mean"]["mean"] == pytest.approx(
        statistics.fmean(found[key]["mean"] for key in ("sst_accuracy", "quora_accuracy", "sts_pearson"))
    )


def test_what_does_not_differ_is_not_found_to(results, tmp_path):
    runs, _, _ = results
    same = {WITHOUT: runs[WITH], WITH: runs[WITH]}
    differences = compared(EXPERIMENTS["exp1"], records_of(same))["splits"]["dev"]["difference"]
    assert set(map(json.dumps, differences.values())) == {'{"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}'}
    page = write_comparison(same, tmp_path / "exp1", EXPERIMENTS["exp1"])
    text = (page.parent / "report.md").read_text()
    assert f"- SST accuracy: no difference between {WITHOUT} and {WITH} that" in text


def test_only_seeds_that_both_variants_have_are_paired(results):
    runs, _, _ = results
    whole = compared(EXPERIMENTS["exp1"], records_of({WITHOUT: runs[WITHOUT][1:2], WITH: runs[WITH][1:2]}))
    uneven = compared(EXPERIMENTS["exp1"], records_of({WITHOUT: runs[WITHOUT][:2], WITH: runs[WITH][1:]}))
    assert uneven["splits"]["dev"]["difference"] == whole["splits"]["dev"]["difference"]
    one = whole["splits"]["dev"]["variants"][WITH]["result"]["sst_accuracy"]
    assert one["spread"] is None and one["values"] == [one["mean"]]
    apart = compared(EXPERIMENTS["exp1"], records_of({WITHOUT: runs[WITHOUT][:1], WITH: runs[WITH][1:]}))
    assert apart["splits"]["dev"]["difference"] == {}


def test_what_was_predicted_before_more_was_trained_does_not_count(results):
    runs, _, _ = results
    (runs[WITH][0] / "summary.json").write_text("{}")
    found = compared(EXPERIMENTS["exp1"], records_of(runs))["splits"]["dev"]
    assert set(found["difference"]["sst_accuracy"]) == {"mean"}
    assert len(found["variants"][WITH]["result"]["sst_accuracy"]["values"]) == 3


def test_other_examples_are_no_pairs(results):
    runs, made, labels = results
    labels["sst"] = np.roll(labels["sst"], 1)
    write_outcomes(runs[WITH][2], "dev", made[WITH][2], labels)
    with pytest.raises(ConfigError, match="were not evaluated on the same dev examples of sst; evaluate"):
        compared(EXPERIMENTS["exp1"], records_of(runs))
    outcomes_file(runs[WITH][2], "dev").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"2/outcomes/dev\.safetensors cannot be read .*; evaluate"):
        compared(EXPERIMENTS["exp1"], records_of(runs))


def test_the_page_says_what_was_found(results, tmp_path):
    runs, _, _ = results
    for path in runs[WITHOUT]:
        add_to_summary(path, data={"quora-train": {"used": 16000}, "sst-train": {"used": 8544}})
    page = write_comparison(runs, tmp_path / "exp1", EXPERIMENTS["exp1"])
    text = (page.parent / "report.md").read_text()
    found = json.loads((page.parent / "comparison.json").read_text())["splits"]["dev"]
    score = found["variants"][WITH]["result"]["sst_accuracy"]
    shown = f"{score['mean']:.3f} ± {score['spread']:.3f}"
    assert table_row(text, f"Ours (dev): {WITH}")[0] == shown
    apart = found["difference"]["sts_pearson"]
    shown = f"{apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})"
    assert table_row(text, "Ours (dev): difference")[2] == shown
    assert table_row(text, f"Ours (dev, last epoch): {WITH}")[1] == "0.500 ± 0.000"
    assert table_row(text, "Paper (test): difference")[:3] == ["+0.069", "+0.007", "+0.008"]
    apart = found["difference"]["sst_accuracy"]["mean"]
    assert f"- SST accuracy: {WITH} is {apart:.3f} above {WITHOUT} (p" in text
    assert "over 3 seeds" in text and "Rows used here, of the paper's: quora-train 16,000 of 141,506." in text
    assert table_row(text, f"`../{WITH}/1`")[4] == "1 of 2"
    for name in ("comparison", "dev_metrics"):
        assert (page.parent / "plots" / f"{name}.png").stat().st_size > 10_000


def test_runs_without_outcomes_have_no_interval(tmp_path):
    runs = {}
    for name, sst in ((WITHOUT, 0.40), (WITH, 0.45)):
        records = [evaluation("finetune", epoch, epoch, sst, 0.7, 0.4) for epoch in (1, 2)]
        runs[name] = [write_run(tmp_path / name, records)]
    page = write_comparison(runs, tmp_path / "exp1", EXPERIMENTS["exp1"])
    markdown = (page.parent / "report.md").read_text()
    assert table_row(markdown, f"Ours (dev): {WITHOUT}")[:2] == ["0.400", "0.700"]
    assert table_row(markdown, "Ours (dev): difference")[:2] == ["+0.050", "+0.000"]
    assert "One seed." in markdown


def test_comparison_of_other_tasks(tmp_path):
    run = write_four_task_run(tmp_path / "run")
    page = write_comparison({WITH: [run]}, tmp_path / "exp1", EXPERIMENTS["exp1"])
    markdown = (page.parent / "report.md").read_text()
    found = ["0.900", "0.700", "0.600", "0.400", "0.650"]
    assert table_row(markdown, f"Ours (dev): {WITH}") == found
    assert table_row(markdown, f"Ours (dev): {WITHOUT}") == ["—"] * 5
    assert f"Not run: `{WITHOUT}`." in markdown
    assert "the paper" not in markdown.lower() and (tmp_path / "exp1" / "plots" / "dev_metrics.png").is_file()


def test_comparison_on_test_where_both_runs_have_it(tmp_path):
    runs = {}
    for name, sst in (("without pre-training", 0.40), ("with pre-training", 0.45)):
        records = [evaluation("finetune", epoch, epoch, sst, 0.7, 0.4) for epoch in (1, 2)]
        test = evaluation("", 0, 0, sst - 0.1, 0.6, 0.3)["metrics"]
        runs[name] = [write_run(tmp_path / name, records, {"dev": records[0]["metrics"], "test": test})]
    page = write_comparison(runs, tmp_path / "exp1", EXPERIMENTS["exp1"]).parent / "report.md"
    markdown = page.read_text()
    assert table_row(markdown, "Ours (test): without pre-training")[:2] == ["0.300", "0.600"]
    assert table_row(markdown, "Ours (test): difference")[:2] == ["+0.050", "+0.000"]
    assert table_row(markdown, "Ours (dev): without pre-training")[:2] == ["0.400", "0.700"]
    assert "ours are on the test split of the run's own data and on dev." in markdown
    assert markdown.count("| 1 of 2 |") == 2

    add_to_summary(runs["with pre-training"][0], test={"sst_accuracy": 0.3})
    write_comparison(runs, tmp_path / "exp1", EXPERIMENTS["exp1"])
    assert "Ours (test)" not in page.read_text() and "ours are on dev." in page.read_text()


def test_comparison_with_one_run_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "lstm", [evaluation("finetune", 1, 1, 0.4, 0.7, 0.4)])
    page = write_comparison({"LSTM head": [run]}, tmp_path / "exp2", EXPERIMENTS["exp2"])
    markdown = (page.parent / "report.md").read_text()
    assert "Not run: `linear head`." in markdown
    assert table_row(markdown, "Ours (dev): difference")[0] == "—"


def test_comparison_names_what_is_unknown(tmp_path):
    with pytest.raises(ValueError, match=r"'cnn' is no variant of Exp-II.* linear head, LSTM head"):
        write_comparison({"cnn": ["."]}, tmp_path, EXPERIMENTS["exp2"])
