"""Fixtures for the real data and the real checkpoint that some tests run on."""

import os
from pathlib import Path

import pytest

# Where checking values on a GPU would cost a synchronisation, ops do it only when asked to: here, always.
os.environ.setdefault("MTFAST_CHECK_VALUES", "1")


def _directory_from(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names {what}")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"{variable}={value} is not a directory; it should name {what}")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory with `cs224n/` (task files) and `imdb/` (review Parquet files)."""
    return _directory_from("MTFAST_TEST_DATA", "a directory with cs224n/ and imdb/")


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """A Hugging Face BERT checkpoint directory with its tokenizer."""
    return _directory_from("MTFAST_TEST_CHECKPOINT", "a Hugging Face BERT checkpoint directory")
