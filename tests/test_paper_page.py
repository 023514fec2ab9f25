"""docs/paper.md: the settings it names are the recipe's, and it names all that results follow from."""

import dataclasses
import re
from pathlib import Path

import yaml

from mtfast.config import to_dict
from mtfast.experiments import ALL_RECIPES, PAPER_FIGURES, PAPER_ROWS, runs_of
from mtfast.recipes import paper

PAGE = (Path(__file__).parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+|seed): ([^`]+)`", PAGE)
# Which results do not follow from, or which have no part in the paper's recipe.
LEFT_OUT = {
    *("accumulation", "checkpoint_every", "keep", "max_steps", "max_skipped", "non_finite"),
    *("temperature", "from_scratch", "tasks", "strict", "cache_dir"),
}


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_settings_are_the_recipes():
    values = flat(to_dict(paper()))
    [lstm] = runs_of("exp2", ALL_RECIPES["exp2"]())["LSTM head"]
    assert len(NAMED) > 50
    for field, text in NAMED:
        allowed = [values[field], flat(to_dict(lstm))[field]]
        assert (type(values[field])(text) if "e-" in text else yaml.safe_load(text)) in allowed, field


def test_every_setting_is_there():
    named = {field for field, _ in NAMED}
    for section in ("model", "data", "pretrain", "heads", "finetune"):
        settings = flat(dataclasses.asdict(getattr(paper(), section)), f"{section}.")
        wanted = {field for field in settings if field.split(".")[-1] not in LEFT_OUT}
        assert wanted <= named, wanted - named


def test_figures_and_rows_are_those_of_reports():
    for figures in PAPER_FIGURES.values():
        shown = " / ".join(f"{figures[key]:.3f}" for key in ("sst_accuracy", "quora_accuracy", "sts_pearson"))
        assert shown in PAGE
    for name, title in (("sst", "SST"), ("quora", "Quora"), ("sts", "STS")):
        rows = (f"{PAPER_ROWS[f'{name}-{split}']:,}" for split in ("train", "dev", "test"))
        assert f"| {title} | {' | '.join(rows)} |" in PAGE
    assert f"| IMDb reviews | {PAPER_ROWS['reviews']:,} |" in PAGE
