"""How often a state is saved, as people write it."""

import pytest

from mtfast.config import ConfigError
from mtfast.config_file import read_config_file
from mtfast.interval import Interval, parse_interval
from mtfast.recipes import RECIPES

WANTED = "must be a number of steps, of epochs or a time, such as '200 steps', '1 epoch' or '10 minutes'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200 steps", Interval(steps=200)),
        ("1 step", Interval(steps=1)),
        ("1 epoch", Interval(epochs=1)),
        (" 5 epochs ", Interval(epochs=5)),
        ("30 seconds", Interval(seconds=30)),
        ("1  second", Interval(seconds=1)),
        ("10 minutes", Interval(seconds=600)),
        ("1 hour", Interval(seconds=3600)),
        ("2 hours", Interval(seconds=7200)),
    ],
)
def test_what_is_understood(text, expected):
    assert parse_interval(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "200",
        "steps",
        "0 steps",
        "-1 steps",
        "1.5 hours",
        "5 days",
        "1 epochal",
        "1 step 2",
        "10m",
        "² steps",
        "9" * 5000 + " steps",
        3,
    ],
)
def test_what_is_not(text):
    with pytest.raises(ValueError) as raised:
        parse_interval(text)
    assert str(raised.value) == f"{text!r} {WANTED}"


def test_a_bare_number_in_a_file_is_told_what_is_right(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: paper\nfinetune:\n  checkpoint_every: 200\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_config_file(file, RECIPES)
    assert str(raised.value) == f"{file}:3: finetune.checkpoint_every is 200; it {WANTED}"
