"""Every field of the configuration on values nobody would write: what is accepted works, all else is named.

What is drawn follows from the fields' type hints, so a field that is added is covered by itself.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import types
import typing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mtfast import cli
from mtfast.config import STAGES, ConfigError, RunConfig, to_dict, validate
from mtfast.config_file import read_config_file
from mtfast.errors import shown
from mtfast.files import to_yaml
from mtfast.interval import parse_interval
from mtfast.recipes import RECIPES, paper
from mtfast.tasks import Task
from mtfast.training.engine.deepspeed_config import deepspeed_config
from mtfast.training.run.settings import FREE, PLACES, SHARING, Change, Progress, changes, located, refused
from mtfast.training.schedule import learning_rate_at

pytestmark = pytest.mark.sweep
_FULL = os.environ.get("MTFAST_TEST_SWEEP") == "full"


def examples(number: int, full: int) -> settings:
    """So many of a property, the same each time unless the sweep is full."""
    return settings(
        max_examples=full if _FULL else number,
        derandomize=not _FULL,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TASKS = ("sst", "sts")  # with classes, and with bounds
CONFIG = replace(paper(), tasks={name: paper().tasks[name] for name in TASKS})


def fields_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every field by its dotted name, through all sections and the tasks."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            found |= fields_of(hint, f"{prefix}{name}.")
        elif hint == dict[str, Task]:
            for task in TASKS:
                found |= fields_of(Task, f"{prefix}{name}.{task}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


FIELDS = fields_of(RunConfig)
each_field = pytest.mark.parametrize("field", FIELDS)

NUMBERS = [0, 1, 2, 5, 8, 200, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, -(10**5000)]
REALS = [
    0.0,
    -0.0,
    0.1,
    0.5,
    1.0,
    2.0,
    5e-324,
    1e-45,
    1e38,
    1e39,
    1.7e308,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
]
TEXTS = [
    "", " ", "\n", "a\nb: c", "null", "None", "1e5", "true", "~", "~nobody/x", "-", "--help", "-1",
    "{split}", "x.csv", "../x", "\x00", "a\x00b", "\ud800", "\udc80", "é\u2028\U0001f3ac", "'", '"', "#",
    "%s %(prog)s", "[a]", "{a}", "a" * 300, "a" * 5000, "200 steps", " 1 epoch ", "0 steps", "10 minutes",
    "9" * 30 + " hours", "9" * 5000 + " steps", "pair", "linear", "lstm", "f1", "accuracy", "pearson",
    "sentence", "2024-13-45", "=", "<<", "!!int x", "&a", "*a",
]  # fmt: skip


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, the odd ones among them; of tuples also those of a wrong length."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, parts))
    if origin is tuple:
        return st.lists(values_of(parts[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(parts[0]), values_of(parts[1]), max_size=3)
    return {
        bool: st.booleans(),
        int: st.one_of(st.sampled_from(NUMBERS), st.integers()),
        float: st.one_of(st.sampled_from(REALS), st.floats(0, 1), st.floats(), st.sampled_from(NUMBERS)),
        str: st.one_of(st.sampled_from(TEXTS), st.text(max_size=12)),
        types.NoneType: st.none(),
    }[hint]


def changed(config: RunConfig, field: str, value: Any) -> RunConfig:
    parts = field.split(".")
    holders: list[Any] = [config]
    for part in parts[:-1]:
        holders.append(holders[-1][part] if isinstance(holders[-1], dict) else getattr(holders[-1], part))
    for holder, part in zip(reversed(holders), reversed(parts), strict=True):
        value = holder | {part: value} if isinstance(holder, dict) else replace(holder, **{part: value})
    return value


def is_valid(config: RunConfig) -> bool:
    try:
        validate(config)
    except ConfigError:
        return False
    return True


@st.composite
def valid_configs(draw: st.DrawFn) -> RunConfig:
    """The paper's with other values in up to eight fields, as far as they are accepted."""
    config = CONFIG
    for _ in range(draw(st.integers(1, 8))):
        field = draw(st.sampled_from(list(FIELDS)))
        config = max(config, changed(config, field, draw(values_of(FIELDS[field]))), key=is_valid)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def test_every_field_is_drawn():
    leaves = []

    def walk(value: Any, prefix: str) -> None:
        for name in value if isinstance(value, dict) else (f.name for f in dataclasses.fields(value)):
            inner = value[name] if isinstance(value, dict) else getattr(value, name)
            if dataclasses.is_dataclass(inner) or (name == "tasks" and not prefix):
                walk(inner, f"{prefix}{name}.")
            else:
                leaves.append(f"{prefix}{name}")

    walk(CONFIG, "")
    assert list(FIELDS) == leaves and len(leaves) > 90


# What no longer fits where a task's field is changed; the message is of the one or of the other.
NO_LONGER_FITS = {
    "kind": {"classes", "low", "high", "metric"},
    "text": {"head", "pair_input"},
    "label": {"text"},
    "low": {"high"},
    "head": {"pair_input"},
    "pair_input": {"head", "pair_input"},  # also of a task that shares its head
}


@each_field
def test_a_value_of_the_fields_type_is_accepted_or_named(field):
    name = field.rpartition(".")[2]

    @examples(12, 500)
    @given(values_of(FIELDS[field]))
    def check(value: Any) -> None:
        try:
            validate(changed(CONFIG, field, value))
        except ConfigError as error:
            assert error.field is not None and str(error).startswith(f"{error.field} is ")
            assert len(str(error)) < 400
            if error.field == field:
                said = str(error).removeprefix(f"{field} is ")
                as_it_is = [value] if isinstance(value, str) else []
                assert said.startswith((shown(value), *as_it_is, "not set")), said
            else:
                assert field.startswith("tasks.")
                assert error.field.rpartition(".")[2] in NO_LONGER_FITS[name]

    check()


@examples(30, 5000)
@given(valid_configs(), st.integers(1, 300))
def test_what_is_accepted_is_kept_in_a_file_and_works(folder, config, total_steps):
    file = folder / "kept.yaml"
    file.write_text(to_yaml(to_dict(config)), encoding="utf-8")
    read = read_config_file(file, RECIPES).config
    assert read == config and list(read.tasks) == list(config.tasks)
    assert located(located(config)) == located(config)
    assert config.path.is_absolute() or not config.run_dir.startswith(("/", "~"))
    for name in STAGES:
        stage = config.stage(name)
        parse_interval(stage.checkpoint_every)
        for step in range(total_steps):
            assert 0.0 <= learning_rate_at(stage, step, total_steps) <= stage.learning_rate
        if stage.batch_size % stage.accumulation == 0:
            made = deepspeed_config(replace(config.engine, deepspeed_config=None), stage, name, 1)
            assert json.loads(json.dumps(made, allow_nan=False)) == made
        with contextlib.suppress(ConfigError):  # of a batch that does not divide, or a JSON file
            deepspeed_config(config.engine, stage, name, 2)


@examples(6, 300)
@given(valid_configs(), st.integers(0, 2**40))
def test_the_command_line_shows_what_a_file_says(folder, config, seed):
    # As options these would be one.
    assume(
        all(len({n.replace("_", "-") for n in t.aliases}) == len(t.aliases) for t in config.tasks.values())
    )
    file, shown_again = folder / "given.yaml", folder / "shown.yaml"
    file.write_text(to_yaml(to_dict(config)), encoding="utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["run", str(file), "--seed", str(seed), "--print-config"])
    shown_again.write_text(out.getvalue(), encoding="utf-8")
    assert read_config_file(shown_again, RECIPES).config == replace(config, seed=seed)


# By what they are not: no field takes any of those left.
WRONG = [None, True, 1.5, "no such", "1e5x", [], [[]], [None], [[1], [2]], {"a": {"b": 1}}, {1: 2}]


def takes(hint: Any, value: Any) -> bool:
    """Whether a value of YAML is one of a field."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in parts and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(takes(part, value) for part in parts)
    if origin is tuple:
        return value == [] and parts[-1] is ...
    kinds: dict[Any, Any] = {float: float, str: str, bool: bool, types.NoneType: types.NoneType}
    return type(value) is kinds.get(hint)


@each_field
def test_a_value_of_another_type_in_a_file_is_answered_with_its_line(field, folder):
    file, (*sections, name) = folder / "wrong.yaml", field.split(".")
    for value in WRONG:
        if takes(FIELDS[field], value):
            continue
        given: Any = {name: value}
        for section in reversed(sections):
            given = {section: given}
        file.write_text(f"recipe: paper\n\n{to_yaml(given)}", encoding="utf-8")
        with pytest.raises(ConfigError) as raised:
            read_config_file(file, RECIPES)
        where = re.match(rf"{re.escape(str(file))}:(\d+): {re.escape(field)}[.\w]* is ", str(raised.value))
        assert where, str(raised.value)
        line = 3 + len(sections)
        assert int(where[1]) in ((line, line + 1) if isinstance(value, dict) else (line,))


PIECES = [
    "seed", "finetune", "epochs", "tasks", "sst", "betas", "model", "mlp", "aliases", "recipe", ": ", ":",
    "\n", "\n  ", "- ", ", ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "!!timestamp ",
    "!!binary ", "!!set ", "!!omap ", "!!bool ", "!x ", "? ", "| ", "> ", "'", '"', "# ", "---\n", "%TAG",
    "2024-13-45", "0o9", "1_0", "1:70", ".inf", "~", "1", "yes", "\t", "\x00", "\x85", "\ufeff", "é", "\\x",
    "0x" + "f" * 5000, "1" * 5000,
]  # fmt: skip


@examples(100, 20_000)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_for_a_file_is_read_or_answered_with_a_line(folder, text):
    file = folder / "any.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        config = read_config_file(file, RECIPES).config
    except ConfigError as error:
        assert re.match(rf"{re.escape(str(file))}:\d+: \S", str(error)), str(error)
        assert len(str(error)) < 1000
    else:
        is_valid(config)


@each_field
def test_a_changed_field_is_told_alone_and_refused_unless_results_do_not_follow_from_it(field):
    was = to_dict(CONFIG)
    assert not list(changes(was, to_dict(CONFIG)))

    @examples(6, 200)
    @given(values_of(FIELDS[field]))
    def check(value: Any) -> None:
        config = changed(CONFIG, field, value)
        if not is_valid(config):
            return
        now = to_dict(config)
        found = list(changes(was, now))
        if now == was:
            assert not found
            return
        change = Change(field, at(was, field), at(now, field))
        assert found == [change]
        progress = Progress(steps=1, epochs=1, finished=False, resumable=True)
        reasons = refused(found, lambda name: progress, now)
        if change.is_one_of(PLACES + FREE + SHARING):
            assert reasons == []
        elif change.stage is None and field != "stages":
            assert reasons == [str(change)]
        else:  # it depends on how far the stages are
            assert all(reason.startswith(str(change)) for reason in reasons) and len(reasons) < 2

    check()


def at(values: Any, field: str) -> Any:
    for part in field.split("."):
        values = values[part]
    return values
