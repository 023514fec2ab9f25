"""Configuration files: a recipe's name and what differs from it, in YAML, with the line of every field."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pydantic
import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from mtfast.config import ConfigError, RunConfig, rule_of, to_dict
from mtfast.errors import shown
from mtfast.hints import in_words
from mtfast.tasks import Task

DEFAULT_RECIPE = "paper"
_DEPTH = 4  # of a configuration's names, tasks.sst.aliases.text say
# What PyYAML raises for a value that is not of the type its tag or its form says.
_NOT_OF_ITS_TYPE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: its recipe, the configuration, and the line of each field by its dotted name."""

    path: Path
    recipe: str
    config: RunConfig
    lines: Mapping[str, int] = field(default_factory=dict)

    def place_of(self, field: str | None, config: RunConfig) -> str | None:
        """`file:line` of a field, or of the nearest one around it; None where `config` has another value."""
        if not field or _value(config, field) != _value(self.config, field):
            return None
        return next(
            (f"{self.path}:{self.lines[near]}" for near in _around(field) if near in self.lines), None
        )


def read_config_file(path: Path, recipes: Mapping[str, Callable[[], RunConfig]]) -> ConfigFile:
    """The configuration in a file.

    `recipe` names one of `recipes`, by default the paper's; what else the file sets takes the place of its
    values. `tasks` names all tasks of the run: one that gives its kind is declared anew, another is the
    recipe's of that name with what differs. A run's `config.yaml` is such a file.

    Raises:
        ConfigError: it cannot be read, or cannot be meant; the message has the line, and what would be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        given = yaml.load(text, Loader=_Loader) if root is not None else {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte offset {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}:1: lists or sections are in one another too many times") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not YAML: the character {chr(error.character)!r}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    return _Reader(path, recipes).read(root, given)


@functools.cache
def _adapter() -> pydantic.TypeAdapter[RunConfig]:
    return pydantic.TypeAdapter(RunConfig)


class _Loader(yaml.SafeLoader):
    """Says the line of a value that is not of its type, an integer of 5,000 digits say."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _NOT_OF_ITS_TYPE as error:
            problem = f"{shown(node.value)} cannot be read ({error})"
            raise ConstructorError(None, None, problem, node.start_mark) from error


class _Reader:
    def __init__(self, path: Path, recipes: Mapping[str, Callable[[], RunConfig]]) -> None:
        self.path, self.recipes = path, recipes
        self.lines: dict[str, int] = {}

    def read(self, root: yaml.Node | None, given: Any) -> ConfigFile:
        if not isinstance(given, dict):
            raise ConfigError(f"{self.path}:1: {shown(given)}; a recipe's name and what differs is expected")
        if root is not None:
            self._note_lines(root, "")
        recipe = given.pop("recipe", DEFAULT_RECIPE)
        if not isinstance(recipe, str) or recipe not in self.recipes:
            self._refuse(
                "recipe", f"there is no recipe {recipe!r}; the recipes are {', '.join(self.recipes)}"
            )
        self._check_names(given, RunConfig, "")
        base = to_dict(self.recipes[recipe]())
        values = _over(base, given)
        if "tasks" in given:
            values["tasks"] = {
                name: _declared(base["tasks"], name, task) for name, task in given["tasks"].items()
            }
        try:
            config = _adapter().validate_python(values)
        except pydantic.ValidationError as error:
            self._refuse_value(error)
        return ConfigFile(self.path, recipe, config, self.lines)

    def _note_lines(self, node: yaml.Node, prefix: str) -> None:
        """The line of every key; raises ConfigError for one that is there twice."""
        if not isinstance(node, yaml.MappingNode) or prefix.count(".") >= _DEPTH:
            return  # a section that is an alias of itself has no end
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first:
                what = "two tasks are called" if prefix == "tasks." else "two fields are called"
                there = f"the first in line {first[name]}; give each its own name"
                raise ConfigError(f"{self.path}:{line}: {what} {name!r}, {there}")
            first[name] = self.lines[f"{prefix}{name}"] = line
            self._note_lines(value, f"{prefix}{name}.")

    def _check_names(self, given: Any, kind: Any, prefix: str) -> None:
        """Raises ConfigError for a field that a section does not have."""
        if not isinstance(given, dict):
            return
        hints = typing.get_type_hints(kind)
        for name, value in given.items():
            where = f"{prefix}{name}"
            if name not in hints:
                known = list(hints)
                near = difflib.get_close_matches(str(name), known, n=1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                self._refuse(where, f"there is no field {where}; {meant}")
            if where == "tasks":
                if not isinstance(value, dict):
                    self._refuse(where, "tasks must name each task and declare it below its name")
                for task, declared in value.items():
                    if declared is not None and not isinstance(declared, dict):
                        self._refuse(f"tasks.{task}", f"tasks.{task} is {shown(declared)}; a task has fields")
                    self._check_names(declared, Task, f"tasks.{task}.")
            elif dataclasses.is_dataclass(hints[name]):
                if not isinstance(value, dict):
                    self._refuse(where, f"{where} is {shown(value)}; it has fields, {_names(hints[name])}")
                self._check_names(value, hints[name], f"{where}.")
            elif hints[name] is not bool and _has_bool(value):
                read = f"{where} is {shown(value)}, as YAML reads yes, no, on and off"
                self._refuse(where, f"{read}; wanted is {in_words(hints[name])}")

    def _refuse_value(self, error: pydantic.ValidationError) -> NoReturn:
        found = error.errors(include_url=False)[0]
        # Where a value may be of several kinds, the kind follows the field's name.
        names = [str(part) for part in found["loc"]]
        field = ".".join(names)
        while field not in self.lines and len(names) > 1:
            names.pop()
            field = ".".join(names)
        if found["type"] == "missing" and isinstance(found["loc"][-1], str):
            lacking = str(found["loc"][-1])
            self._refuse(field, f"{field} has no {lacking}; a task needs kind, text and label")
        wanted = found["msg"][0].lower() + found["msg"][1:]
        wanted = wanted.replace("input should", "it should")
        # A text or a tuple that follows rules of its own.
        if found["type"] in ("string_type", "missing", "too_long") and (rule := rule_of(field)):
            wanted = f"it must {rule}"
        self._refuse(field, f"{field} is {shown(found['input'])}; {wanted}")

    def _refuse(self, field: str, text: str) -> NoReturn:
        line = next((self.lines[near] for near in _around(field) if near in self.lines), 1)
        raise ConfigError(f"{self.path}:{line}: {text}")


def _has_bool(value: Any) -> bool:
    return any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value]))


def _around(field: str) -> Iterator[str]:
    """The field, and those that it is in, the nearest first."""
    while field:
        yield field
        field = field.rpartition(".")[0]


def _value(config: RunConfig, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


def _names(section: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(section))


def _declared(recipe: Mapping[str, Any], name: str, fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """A task's fields: as given where its kind is, else the recipe's with what is given in their place."""
    given = dict(fields or {})
    return given if "kind" in given else {**recipe.get(name, {}), **given}


def _over(base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values with the file's in their place, section by section."""
    merged = dict(base)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = _over(base[name], value)
        else:
            merged[name] = value
    return merged
