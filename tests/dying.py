"""Ranks of a run that die, each of its own or all of one thing."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from small_tokenizer import small_tokenizer
from transformers import BertConfig

from mtfast import cli, commands, invocation
from mtfast.commands import open_directory
from mtfast.config import DataConfig, RunConfig
from mtfast.data.rows import DataError
from mtfast.recipes import PAPER_TASKS, paper
from mtfast.tasks import MlpConfig
from mtfast.training.engine import failure, ranks
from mtfast.training.inputs import load_task
from mtfast.training.run import directory
from mtfast.training.run.weights import Weights, build_multitask

BERT = BertConfig(
    vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
)


def die(cause: Callable[[int], object]) -> None:
    """A command that does to this rank what `cause` does when called with its number."""

    def execute(*_: Any) -> None:
        dist.init_process_group("gloo")
        cause(ranks.rank())
        ranks.barrier()

    invocation._parsed = lambda *_: (invocation.NoOptions(), paper())  # which takes half a second to read
    directory.SHARED_SECONDS, failure.PATIENCE_SECONDS = 0.5, 1.0
    commands.execute = execute
    cli.main(["report", "demo"])


def bad_data(rank: int) -> None:
    raise DataError("a.csv:3: bad")


def bad_data_on_rank_1(rank: int) -> None:
    if rank == 1:
        bad_data(rank)


def a_bug_on_rank_1(rank: int) -> None:
    if rank == 1:
        1 / 0  # noqa: B018


def a_bug_on_rank_0(rank: int) -> None:
    if rank == 0:
        1 / 0  # noqa: B018


def no_file_for_rank_0(rank: int) -> None:
    ranks.on_main(open, "none")


def no_share_of_a_cache(rank: int) -> None:
    ranks.main_first(lambda: 1 / (1 - rank))


def a_run_directory_that_is_not_shared(rank: int) -> None:
    os.chdir(f"host-{rank}")
    open_directory(RunConfig(run_dir="run"))


def other_options(rank: int) -> None:
    open_directory(RunConfig(run_dir="shared", seed=rank))


def other_weights(rank: int) -> None:
    build_multitask(Weights(BERT, None, None, None, MlpConfig(), rank), PAPER_TASKS)


def other_data(rank: int) -> None:
    os.chdir(f"host-{rank}")
    task = replace(PAPER_TASKS["sst"], source="data")
    load_task("sst", task, DataConfig(cache_dir="cache"), small_tokenizer(), "train")
