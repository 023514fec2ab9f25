"""The packages that the ops, building them and training need, and what is said where one is missing.

Imports nothing but the standard library, since setup.py asks too, and so does what runs with torch alone.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

BUILD = ("setuptools>=77", "torch>=2.10", "ninja>=1.11", "pybind11>=2.13")  # pyproject.toml has them too
TRAIN = {  # what the extra `train` declares: the name that is imported, and the package's
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "filelock": "filelock",
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sentencex": "sentencex",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "tyro": "tyro",
    "yaml": "pyyaml",
}
SOURCE = Path(__file__).resolve().parents[1]
_REQUIREMENT = re.compile(r"([\w.-]+)>=(\d[\d.]*)(?:; extra == ['\"]([\w-]+)['\"])?")


class MissingExtra(ModuleNotFoundError):
    """A package that the extra `train` declares is not installed."""


class explained:
    """Where an import within fails for want of a package of the extra `train`, says so.

    Raises:
        MissingExtra: it did; whatever else fails keeps its own error.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name in TRAIN:
            raise MissingExtra(
                f"training needs more than the ops: {TRAIN[error.name]} is not installed; "
                f"{install_command('train')}",
                name=error.name,
            ) from None


def install_command(extra: str = "", pip: str = "pip") -> str:
    """The command that installs this mtfast with an extra, or builds it again where none is named.

    A name does for the extra of one that is installed, from wherever: pip then leaves mtfast as it is.
    """
    if extra and version_of("mtfast") is not None:
        return f"{pip} install 'mtfast[{extra}]'"
    extras = f"[{extra}]" if extra else ""
    if (SOURCE / "setup.py").is_file():
        return f"{pip} install --no-build-isolation -e {shlex.quote(f'{SOURCE}{extras}')}"
    return f"{pip} install --no-build-isolation -e {shlex.quote(f'.{extras}')}, in a clone of mtfast"


def cannot_build() -> str | None:
    """Why this Python cannot build mtfast, and what to do about it; None where it can."""
    found = {wanted: version_of(wanted.name) for wanted in parsed(BUILD)}
    if shutil.which("ninja"):
        found = {wanted: version for wanted, version in found.items() if wanted.name != "ninja"}
    lacking = [
        f"{wanted} ({f'{version} is installed' if version else 'not installed'})"
        for wanted, version in found.items()
        if not wanted.met_by(version)
    ]
    if not lacking:
        return None
    return (
        "the ops are compiled against torch and, without build isolation, with what is installed already.\n"
        f"{sys.executable} lacks {', '.join(lacking)}.\n"
        "Install it and try again:\n"
        f"    {shlex.quote(sys.executable)} -m pip install {' '.join(map(shlex.quote, BUILD))}\n"
        "or leave out --no-build-isolation: pip then downloads all of it to build with, a torch for CUDA too."
    )


class Requirement(NamedTuple):
    """A package and the oldest version that will do, and the extra that asks for it, "" for none."""

    name: str
    oldest: str
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.name}>={self.oldest}"

    def met_by(self, version: str | None) -> bool:
        return version is not None and _release(version) >= _release(self.oldest)


def parsed(texts: Iterable[str]) -> list[Requirement]:
    """Requirements as metadata and pyproject.toml have them; those in another form than `name>=version`,
    which only extras for developing have, are left out."""
    found = (_REQUIREMENT.fullmatch(text) for text in texts)
    return [Requirement(match[1], match[2], match[3] or "") for match in found if match]


def version_of(package: str) -> str | None:
    """Of an installed package, from its metadata; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Its numbers, as many in every version: 2.10.0rc1+cpu is 2.10.0."""
    release = re.match(r"[\d.]*", version)
    numbers = [int(number) for number in (release[0] if release else "").split(".") if number]
    return (*numbers, 0, 0, 0, 0)[:4]
