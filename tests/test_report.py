"""The report of a run: its numbers are those recorded, and a run that lacks something still gets one."""

import base64
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from recorded_runs import (
    FOUR_TASKS,
    add_to_summary,
    declaring,
    evaluation,
    markdown_of,
    step,
    table_row,
    write_four_task_run,
    write_run,
)

from mtfast.config import ConfigError
from mtfast.plots import losses_of, metrics_of, plot_dev_metrics, plot_losses
from mtfast.recipes import PAPER_TASKS
from mtfast.report import write_report
from mtfast.run_record import read_run


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


def test_tables_hold_the_recorded_numbers(full_run):
    page = write_report(full_run)
    assert page == full_run / "report.html"
    markdown = (full_run / "report.md").read_text()
    assert table_row(markdown, "Head training, best epoch on dev") == [
        "1",
        "0.310",
        "0.610",
        "0.210",
        "0.377",
        "0.508",
    ]
    assert table_row(markdown, "**Result on dev**")[1:4] == ["**0.457**", "**0.765**", "**0.346**"]
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


def test_peak_memory_is_shown_where_it_was_recorded(full_run):
    assert "peak" not in markdown_of(full_run)  # of an earlier mtfast, which did not record it
    stages = json.loads((full_run / "summary.json").read_text())["stages"]
    stages["pretrain"]["peak_rss_bytes"] = 3 << 30
    add_to_summary(full_run, stages=stages)
    markdown = markdown_of(full_run)
    assert "| last training loss | peak memory (resident) |" in markdown and "GPU memory" not in markdown
    assert table_row(markdown, "Pre-training")[-2:] == ["1.900", "3.00 GiB"]
    assert table_row(markdown, "Fine-tuning")[-2:] == ["1.900", "—"]
    stages["finetune"] |= {"peak_rss_bytes": 1 << 30, "peak_gpu_bytes": 5 << 28}
    add_to_summary(full_run, stages=stages)
    assert table_row(markdown_of(full_run), "Fine-tuning")[-2:] == ["1.00 GiB", "1.25 GiB"]


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


def visible_panels(figure):
    return [panel for panel in figure.axes if panel.get_visible()]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_panels_and_legend_do_not_overlap(count):
    """Whatever the number of tasks; each has its panel, and all panels are of one size."""
    title = "A Title that Does not Fit on one Line of its Panel"
    tasks = {f"task{i}": replace(FOUR_TASKS["imdb"], title=title if i % 2 else None) for i in range(count)}
    steps = [step("finetune", i, **dict.fromkeys(tasks, 0.7 + 0.01 * i)) for i in range(3)]
    scores = {f"{name}_f1": 0.5 for name in tasks}
    evaluations = [{"epoch": epoch, "metrics": scores} for epoch in (1, 2)]
    lines = {"without pre-training": evaluations, "with pre-training": evaluations}
    for figure in (
        plot_losses(losses_of(tasks), steps),
        plot_dev_metrics(metrics_of(tasks), lines, "epoch of fine-tuning"),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        panels = visible_panels(figure)
        titles = [panel.get_title(loc="left").replace("\n", " ") for panel in panels]
        assert titles == [task.title or name for name, task in tasks.items()]
        (legend,) = figure.legends
        boxes = [legend.get_window_extent(renderer), *(panel.get_tightbbox(renderer) for panel in panels)]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert np.ptp([panel.bbox.size for panel in panels], axis=0) == pytest.approx([0, 0], abs=1)
        for panel in panels:
            inner = panel.get_window_extent(renderer)
            assert inner.width > 250 and inner.height > 200


def test_loss_panels_show_the_steps_and_their_mean():
    values = np.random.default_rng(0).normal(1.0, 0.1, 400)
    steps = [step("finetune", i, sst=value) for i, value in enumerate(values)]
    (panel,) = visible_panels(plot_losses(losses_of(PAPER_TASKS), steps))
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


def test_four_tasks(tmp_path):
    run = write_four_task_run(tmp_path)
    markdown = markdown_of(run)
    assert (
        "On dev: News \\*topics\\* accuracy **0.900**, imdb F1 **0.700**, nli accuracy **0.600**, "
        "stars Spearman **0.400**." in markdown
    )
    (header,) = [line for line in markdown.splitlines() if line.startswith("|  | epoch |")]
    assert [cell.strip() for cell in header.strip("|").split("|")][2:] == [
        "News \\*topics\\* accuracy",
        "imdb F1",
        "nli accuracy",
        "stars Spearman",
        "Mean",
        "imdb accuracy",
        "stars Pearson",
    ]
    scores = ["0.900", "0.700", "0.600", "0.400", "0.650", "0.800", "0.500"]
    assert table_row(markdown, "Fine-tuning, best epoch on dev") == ["1", *scores]
    assert table_row(markdown, "**Result on dev**") == ["", *(f"**{score}**" for score in scores)]
    assert "the paper" not in markdown.lower() and "CS 224N" not in markdown.split("## Configuration")[0]
    assert "<em>" not in (run / "report.html").read_text()
    steps, evaluations = (
        read_run(run).steps["finetune"],
        {"Fine-tuning": read_run(run).evaluations["finetune"]},
    )
    for figure in (
        plot_losses(losses_of(FOUR_TASKS), steps),
        plot_dev_metrics(metrics_of(FOUR_TASKS), evaluations, "epoch"),
    ):
        panels = visible_panels(figure)
        rows = [panel.get_subplotspec().rowspan.start for panel in panels]
        assert rows == [0, 0, 0, 1]
        assert [panel.get_title(loc="left") for panel in panels] == ["News *topics*", "imdb", "nli", "stars"]
        assert len({panel.lines[0].get_color() for panel in panels}) == 4
    assert [panel.get_ylabel() for panel in panels] == [
        "accuracy (share of examples)", "F1", "accuracy (share of examples)", "Spearman correlation"
    ]  # fmt: skip


def test_one_task(tmp_path):
    metrics = {"imdb_accuracy": 0.8, "imdb_f1": 0.7, "mean": 0.7}
    evaluated = {"kind": "eval", "stage": "heads", "step": 1, "epoch": 3, "metrics": metrics}
    records = [step("heads", 0, imdb=0.7), step("heads", 1, imdb=0.6), evaluated]
    run = write_run(tmp_path, records, config=declaring({"imdb": FOUR_TASKS["imdb"]}))
    markdown = markdown_of(run)
    assert "On dev: imdb F1 **0.700**." in markdown
    assert table_row(markdown, "Head training, best epoch on dev") == ["3", "0.700", "0.700", "0.800"]
    assert "the paper" not in markdown.lower()
    for name in ("dev_metrics", "losses_heads"):
        assert (run / "plots" / f"{name}.png").is_file()


EARLIER = """
recipe: local
model:
  sentiment_head: lstm
  pair_input: separate
data:
  tasks: data/cs224n
finetune:
  loss_weights:
    sts: 0.5
"""


def test_a_run_of_an_earlier_mtfast_had_the_papers_tasks(tmp_path):
    """Its configuration declares no tasks, and has fields that are no more."""
    run = write_run(tmp_path, [evaluation("heads", 1, 1, 0.3, 0.6, 0.2)], config=EARLIER)
    markdown = markdown_of(run)
    assert "On dev: SST accuracy **0.300**, Quora accuracy **0.600**, STS Pearson **0.200**." in markdown
    assert table_row(markdown, "Head training, best epoch on dev") == [
        "1",
        "0.300",
        "0.600",
        "0.200",
        "0.367",
        "0.500",
    ]
    assert table_row(markdown, "**This run (dev)**")[0] == "**0.300**"
    assert "sentiment_head: lstm" in markdown


def test_tasks_that_cannot_be_read_are_no_others(tmp_path):
    config = declaring(FOUR_TASKS).replace("kind: binary", "kind: trinary")
    line = config.splitlines().index("    kind: trinary") + 1
    with pytest.raises(ConfigError, match=rf"config.yaml:{line}: tasks.imdb.kind is 'trinary'"):
        write_report(write_four_task_run(tmp_path, config))


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
