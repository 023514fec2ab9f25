"""What the parts of the recipe `best` are worth: the variants, their results file, its table and picture."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
from recorded_runs import evaluation, write_run

from benchmarks import ablation, quality_plot, report, speed_plot
from benchmarks.common import RESULTS
from mtfast.config import to_dict, validate
from mtfast.files import to_yaml
from mtfast.recipes import best

SCORES = {
    "best": [(0.50, 0.86, 0.87), (0.51, 0.85, 0.88)],
    "without R-Drop": [(0.48, 0.84, 0.87)],
    "batch of 64": [(0.50, 0.86, 0.84), (0.51, 0.85, 0.94)],
}


def test_every_variant_is_the_recipe_but_for_its_part():
    variants = {name: change(best()) for name, change in ablation.VARIANTS.items()}
    for config in variants.values():
        validate(config)
    assert variants.pop("best") == best()
    assert len(
        {to_yaml(to_dict(config)) for config in variants.values()} - {to_yaml(to_dict(best()))}
    ) == len(variants)
    without = {name: replace(task, rdrop_alpha=0.0) for name, task in best().tasks.items()}
    assert variants["without R-Drop"] == replace(best(), tasks=without)


@pytest.fixture
def found(tmp_path, monkeypatch) -> dict:
    """The results of finished runs, and one that is not."""
    monkeypatch.setattr(ablation, "commit_of", lambda path: "abc1234")
    for name, scores in SCORES.items():
        for seed, of_seed in enumerate(scores):
            config = replace(ablation.VARIANTS[name](best()), seed=seed)
            config = replace(config, model=replace(config.model, checkpoint="/somewhere/bert/small"))
            records = [evaluation("finetune", 5, 1, 0.1, 0.1, 0.1), evaluation("finetune", 9, 2, *of_seed)]
            summary = {
                "dev": records[-1]["metrics"],
                **({"test": evaluation("finetune", 9, 2, 0.4, 0.5, of_seed[2])["metrics"]} if seed else {}),
                "stages": {"heads": {"seconds": 3.0}, "finetune": {"seconds": 60.0 * (seed + 1)}},
                "environment": {"device": "a machine", "threads": 2, "torch": "2.14"},
                "data": {"sst-dev": {"used": 7}},
            }
            run = ablation.run_of(tmp_path, name, seed)
            write_run(run, records, summary, to_yaml(to_dict(config)))
    write_run(ablation.run_of(tmp_path, "best", 2), [], {}, to_yaml(to_dict(best())))
    return ablation.results_of(tmp_path)


def test_results_are_those_of_finished_runs(found):
    assert {name: len(runs) for name, runs in found["variants"].items() if runs} == {
        "best": 2,
        "without R-Drop": 1,
        "batch of 64": 2,
    }
    first, second = found["variants"]["best"]
    assert (first["seed"], second["seed"], second["epoch"]) == (0, 1, 2)
    assert second["dev"]["sts_pearson"] == 0.88 and first["seconds"] == {"heads": 3.0, "finetune": 60.0}
    assert found["checkpoint"] == "bert/small" and found["rows"] == {"sst-dev": 7}
    assert "/somewhere" not in json.dumps(found)


def test_runs_of_another_machine_stay_where_the_settings_are_the_same(found):
    earlier = json.loads(json.dumps(found))
    for seed, run in enumerate(earlier["variants"]["best"], start=1):
        run |= {"seed": seed, "commit": "0ld"}
    earlier["variants"]["a part of old"] = earlier["variants"]["best"]
    both = ablation.with_earlier(found, earlier)["variants"]
    assert [(run["seed"], run["commit"]) for run in both["best"]] == [
        (0, "abc1234"),
        (1, "abc1234"),
        (2, "0ld"),
    ]
    assert both["without R-Drop"] == found["variants"]["without R-Drop"] and "a part of old" not in both
    earlier["config"] = earlier["config"] | {"seed": 5}
    assert ablation.with_earlier(found, earlier) == found


def test_the_table_has_means_and_spreads(found, tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    text = report.render("<!-- results: ablation -->\n<!-- end -->", tmp_path)
    assert "a machine, 2 threads, torch 2.14; commit abc1234:" in text
    means = [statistics.fmean(scores) for scores in SCORES["best"]]
    mean, spread = statistics.fmean(means), statistics.stdev(means)
    assert f"| best | 2 | 0.505 ± 0.007 | 0.855 ± 0.007 | 0.875 ± 0.007 | {mean:.3f} ± {spread:.3f} |" in text
    assert "| without R-Drop | 1 | -0.0200 | -0.0200 | +0.0000 | -0.0133 |" in text  # against seed 0
    assert "| +0.0000 ± 0.0000 | +0.0150 ± 0.0636 | +0.0050 ± 0.0212 |" in text  # STS -0.03 and +0.06


def test_another_table_has_the_runs_that_were_tested(found, tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    text = report.render("<!-- results: ablation test -->\n<!-- end -->", tmp_path)
    assert "| best | 1 | 0.400 | 0.500 | 0.880 | 0.593 |" in text
    assert "| batch of 64 | 1 | +0.0000 | +0.0000 | +0.0600 | +0.0200 |" in text
    assert "R-Drop" not in text


def test_pictures_are_drawn(found, tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    shutil.copy(RESULTS / "run-local-separate.json", tmp_path)
    for picture in (
        quality_plot.draw(tmp_path, tmp_path / "quality.png"),
        speed_plot.draw(RESULTS, tmp_path / "speed.png"),
    ):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
