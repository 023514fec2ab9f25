"""Fixtures for the real data and the real checkpoint that some tests run on, and for how far sweeps go.

MTFAST_TEST_SWEEP=full runs every random case of the ops' sweeps, on the CUDA source executed on the CPU too,
which takes about half an hour, and 10,000 inputs of each property; without it a part of them runs
that has each kind of case, the same inputs each time.
"""

import gc
import os
from pathlib import Path

import pytest
import torch

# Where checking values on a GPU would cost a synchronisation, ops do it only when asked to: here, always.
os.environ.setdefault("MTFAST_CHECK_VALUES", "1")


# Begun first, so that the processes which share the files out end together.
LONGEST = ("test_launch", "test_packed_attention_kernels", "test_training_parity", "test_packed_attention")
LONGEST += ("test_faults", "test_stopping", "test_loss_curves")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first. Leaves out what needs a GPU where there is none, unless a marker expression
    asks for it."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if torch.cuda.is_available() or config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Each stage of each run collects garbage, and would go through all that was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def full_sweep() -> bool:
    """Whether sweeps over random cases run all of them: MTFAST_TEST_SWEEP=full."""
    value = os.environ.get("MTFAST_TEST_SWEEP", "")
    if value not in ("", "full"):
        pytest.fail(f"MTFAST_TEST_SWEEP={value}: it should be full, or not set")
    return value == "full"


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
