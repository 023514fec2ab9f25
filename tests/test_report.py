"""The report of a run: its numbers are those recorded, and a run that lacks something still gets one."""

import base64
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from mtfast.plots import plot_losses
from mtfast.report import read_run, write_comparison, write_report


def step(stage, number, **losses):
    return {
        "kind": "step",
        "stage": stage,
        "step": number,
        "epoch": 0,
        "loss": sum(losses.values()),
        "losses": losses,
    }


def evaluation(stage, number, epoch, sst, quora, sts):
    metrics = {
        "sst_accuracy": sst,
        "quora_accuracy": quora,
        "sts_pearson": sts,
        "mean": (sst + quora + sts) / 3,
    }
    metrics["cs224n_overall"] = (sst + quora + (sts + 1) / 2) / 3
    return {"kind": "eval", "stage": stage, "step": number, "epoch": epoch, "metrics": metrics}


def write_run(directory, records, summary=None, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (directory / "config.yaml").write_text(config)
    return directory


@pytest.fixture
def full_run(tmp_path):
    records = [step("pretrain", i, mlm=7 - 0.1 * i, nsp=0.7) for i in range(30)]
    records += [step("heads", i, sst=1.6, quora=0.7, sts=2.0) for i in range(30)]
    records += [evaluation("heads", 29, 1, 0.31, 0.61, 0.21), evaluation("heads", 59, 2, 0.30, 0.60, 0.20)]
    records += [step("finetune", i, sst=1.4, quora=0.5, sts=1.5) for i in range(30)]
    records += [evaluation("finetune", 29, 1, 0.4567, 0.7654, 0.3456)]
    dev = records[-1]["metrics"]
    timing = {
        "steps": 1234,
        "examples_per_s": 210.4,
        "tokens_per_s": 6120.2,
        "first_loss": 4.4,
        "last_loss": 1.9,
    }
    stages = {"pretrain": {"seconds": 75.4, **timing}, "finetune": {"seconds": 3700, **timing}}
    skipped = [{"file": "quora-train.csv", "line": line, "reason": "empty label"} for line in range(1, 13)]
    data = {
        "quora-train": {"read": 16000, "used": 15988, "skipped": skipped, "truncated": 3},
        "sts-dev": {
            "read": 90, "used": 90, "skipped": [], "truncated": 0, "unknown": 40, "word_pieces": 1000,
            "notes": ["files joined: dev-1.csv, dev-2.csv"],
        },
    }  # fmt: skip
    summary = {
        "dev": dev,
        "stages": stages,
        "data": data,
        "environment": {"torch": "2.13.0"},
    }
    return write_run(tmp_path / "run", records, summary, "recipe: local\n")


def table_row(markdown, label):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_tables_hold_the_recorded_numbers(full_run):
    page = write_report(full_run)
    assert page == full_run / "report.html"
    markdown = (full_run / "report.md").read_text()
    assert table_row(markdown, "Head training, best epoch") == [
        "1",
        "0.310",
        "0.610",
        "0.210",
        "0.377",
        "0.508",
    ]
    assert table_row(markdown, "**Result of the run**")[1:4] == ["**0.457**", "**0.765**", "**0.346**"]
    assert table_row(markdown, "Pre-training") == ["1,234", "1 min 15 s", "210", "6,120", "4.400", "1.900"]
    assert table_row(markdown, "Fine-tuning")[1] == "1 h 1 min"
    assert table_row(markdown, "Paper, without pre-training (test)")[:3] == ["0.480", "0.851", "0.623"]
    assert table_row(markdown, "Paper, with pre-training (test)")[:3] == ["0.549", "0.858", "0.631"]
    assert table_row(markdown, "Paper, LSTM head (test)")[:3] == ["0.500", "0.859", "0.656"]
    assert table_row(markdown, "quora-train") == ["16,000", "15,988", "12", "3"]
    assert "- `quora-train.csv:10`: empty label\n- and 2 more" in markdown
    assert (
        "- sts-dev: files joined: dev-1.csv, dev-2.csv\n- sts-dev: 40 of 1,000 word pieces stand" in markdown
    )
    assert "Not finished or not part of this run: head training." in markdown


def test_page_is_self_contained(full_run):
    page = write_report(full_run).read_text()
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == 4
    for picture in pictures:
        encoded = picture.removeprefix("data:image/png;base64,")
        assert base64.b64decode(encoded).startswith(b"\x89PNG")
    assert "<table>" in page and "<strong>0.457</strong>" in page and "http" not in page


def test_plots_are_drawn(full_run):
    write_report(full_run)
    for name in ("dev_metrics", "losses_pretrain", "losses_heads", "losses_finetune"):
        pixels = imread(full_run / "plots" / f"{name}.png")
        coloured = np.ptp(pixels[..., :3], axis=2) > 0.3
        assert coloured.sum() > 1000, name


def test_loss_panels_show_the_steps_and_their_mean():
    values = np.random.default_rng(0).normal(1.0, 0.1, 400)
    panels = plot_losses([step("finetune", i, sst=value) for i, value in enumerate(values)]).axes
    (panel,) = [panel for panel in panels if panel.get_visible()]
    raw, mean = panel.lines
    assert np.array_equal(raw.get_ydata(), values)
    assert np.isclose(mean.get_ydata()[200], values[190:211].mean())
    assert panel.get_xlabel() == "optimizer step" and panel.get_ylabel() == "cross entropy (nats)"


def test_a_run_that_recorded_nothing_gets_a_report(tmp_path):
    markdown = (write_report(tmp_path).parent / "report.md").read_text()
    assert "not been evaluated on dev yet" in markdown and "No evaluation is recorded." in markdown
    assert "Not finished or not part of this run: pre-training, head training, fine-tuning." in markdown


def test_an_interrupted_run_gets_a_report(tmp_path):
    records = [
        step("heads", 0, sst=1.6, quora=0.7, sts=float("nan")),
        evaluation("heads", 1, 1, 0.3, 0.6, 0.2),
    ]
    run = write_run(tmp_path, records)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "sta')
    markdown = (write_report(run).parent / "report.md").read_text()
    assert "SST accuracy **0.300**" in markdown
    assert "1 unreadable line(s) of `metrics.jsonl` were left out." in markdown


def test_a_step_recorded_twice_counts_once(tmp_path):
    run = write_run(tmp_path, [step("heads", i, sst=9.0) for i in (0, 1, 2)] + [step("heads", 1, sst=1.0)])
    assert [(s["step"], s["loss"]) for s in read_run(run).steps["heads"]] == [(0, 9.0), (1, 1.0), (2, 9.0)]


def test_recorded_text_is_not_markup(tmp_path):
    skipped = [{"file": "a_b*.csv", "line": 3, "reason": "empty <b>my_own_column</b>"}]
    summary = {
        "environment": {"note": "a | b <i>"},
        "data": {"sst-train": {"read": 1, "used": 0, "skipped": skipped}},
    }
    page = write_report(write_run(tmp_path / "my_own_run", [], summary)).read_text()
    assert "<b>" not in page and "<i>" not in page and "<em>" not in page
    for text in ("my_own_run", "my_own_column", "a | b", "a_b*.csv:3"):
        assert text in page


def test_no_such_run_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="run_dir"):
        write_report(tmp_path / "nowhere")


def test_comparison_sets_both_runs_beside_the_paper(tmp_path):
    runs = {}
    for name, sst in (("without pre-training", 0.40), ("with pre-training", 0.45)):
        records = [evaluation("finetune", epoch, epoch, sst, 0.7, 0.4) for epoch in (1, 2)]
        runs[name] = write_run(tmp_path / name, records)
    page = write_comparison(runs, tmp_path / "exp1", "exp1")
    markdown = (page.parent / "report.md").read_text()
    assert table_row(markdown, "Paper (test): difference")[:3] == ["+0.069", "+0.007", "+0.008"]
    assert table_row(markdown, "Ours (dev): without pre-training")[:2] == ["0.400", "0.700"]
    assert table_row(markdown, "Ours (dev): difference")[:2] == ["+0.050", "+0.000"]
    assert (tmp_path / "exp1" / "plots" / "dev_metrics.png").is_file()


def test_comparison_with_one_run_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "lstm", [evaluation("finetune", 1, 1, 0.4, 0.7, 0.4)])
    markdown = (
        write_comparison({"LSTM head": run}, tmp_path / "exp2", "exp2").parent / "report.md"
    ).read_text()
    assert "Not run: `linear head`." in markdown
    assert table_row(markdown, "Ours (dev): difference")[0] == "—"


@pytest.mark.parametrize(
    ("runs", "experiment", "said"), [({}, "exp3", "exp1, exp2"), ({"cnn": "."}, "exp2", "'cnn'")]
)
def test_comparison_names_what_is_unknown(tmp_path, runs, experiment, said):
    with pytest.raises(ValueError, match=said):
        write_comparison(runs, tmp_path, experiment)
