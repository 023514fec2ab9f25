"""Steps that are filled up so that their shapes repeat: how many there are, and that no loss sees it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bert_twins import paper_tasks
from paper_tables import read_paper_task
from stages import demo_on, stage_of
from torch import Tensor
from transformers import AutoTokenizer

from mtfast.config import EngineConfig, HeadsConfig, TaskStageConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.data.packing import packed_steps
from mtfast.data.tokens import tokenize_task
from mtfast.recipes import PAPER_TASKS, paper
from mtfast.training.stage import Stage
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain


class Planned(Finetune):
    """The steps of fine-tuning, without a model."""

    def __init__(self, tables, settings: TaskStageConfig) -> None:
        super(Finetune, self).__init__({"train": tables, "dev": {}}.__getitem__, settings, seed=0)
        self.engine = SimpleNamespace(device=torch.device("cpu"))


def test_an_epoch_of_the_real_mixture_has_few_shapes(data_dir, checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    raw = {name: read_paper_task(name, data_dir / "cs224n", "train") for name in PAPER_TASKS}
    tables = {name: tokenize_task(table, tokenizer, max_length=128) for name, table in raw.items()}
    stage = Planned(tables, paper().finetune)
    assert stage.settings.batch_size == 160
    as_they_come = packed_steps(tables, stage.plan(0), torch.device("cpu"), stage.layout.shares, None)
    assert len({batch.shape for (batch,) in as_they_come}) > 160
    shapes, lengths = [], {name: table.sequences.lengths for name, table in tables.items()}
    for epoch in range(2):
        plan, counted = (
            stage.plan(epoch),
            {name: np.zeros(len(table), np.int64) for name, table in tables.items()},
        )
        tokens = real = 0
        for step, (batch,) in zip(plan, stage.micro_batches(plan, epoch), strict=True):
            (examples,) = step.micro_batches
            for name, rows in examples.items():
                np.add.at(counted[name], rows, 1)
                assert np.count_nonzero(batch.tasks[name].weights) == len(rows)
                begins = batch.tasks[name].sequences[: len(rows)].flatten()
                per = tables[name].task.sequences_per_example
                found = batch.cu_seqlens.diff()[begins].view(-1, per)
                assert (found.numpy() == lengths[name].reshape(-1, per)[rows]).all()
            shapes.append(batch.shape)
            tokens, real = tokens + len(batch.input_ids), real + batch.tokens
        assert all((times == 1).all() for times in counted.values())
        assert real == sum(table.sequences.lengths.sum() for table in tables.values())
        assert tokens <= 1.03 * real
        assert len(set(shapes[-len(plan) :])) <= 24
    assert len(set(shapes)) <= 24  # the next epoch has the same ones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


def losses_and_gradients(stage: Stage) -> tuple[list[dict], list[dict[str, Tensor]]]:
    """Of an epoch's first steps, all micro-batches, without dropout."""
    module = stage.engine.model = getattr(stage.engine.model, "module", stage.engine.model)  # no engine
    module.eval()
    losses, gradients = [], []
    for batches in stage.micro_batches(stage.plan(0)[:3], 0):
        for batch in batches:
            found = stage.losses(batch)
            stage.total(found).backward()
            losses.append({name: loss.detach() for name, loss in found.items()})
            gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
            module.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(
    ("kind", "head", "settings", "rdrop_alpha"),
    [
        (Finetune, "linear", TaskStageConfig(batch_size=40), 0.0),
        (Finetune, "linear", TaskStageConfig(batch_size=20, accumulation=2), 2.0),
        (Finetune, "lstm", TaskStageConfig(batch_size=42, accumulation=3), 0.0),
        (Heads, "linear", HeadsConfig(batch_size=200, accumulation=2), 0.0),
        (Heads, "lstm", HeadsConfig(batch_size=200), 2.0),
        (Heads, "lstm", HeadsConfig(batch_size=60, features="live"), 0.0),
        (Pretrain, "linear", None, 0.0),
    ],
)
def test_what_fills_up_is_seen_by_no_loss(kind, head, settings, rdrop_alpha, corpus, tmp_path):
    config = demo_on(corpus, tmp_path / "run")
    tasks = paper_tasks(head)
    config = replace(
        config,
        tasks=tasks | {"sst": replace(tasks["sst"], rdrop_alpha=rdrop_alpha)},
        model=replace(config.model, dropout_p=0.0),
        data=replace(config.data, max_reviews=60),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        pretrain=replace(config.pretrain, batch_size=9),
        **({} if settings is None else {kind.name: settings}),
    )
    stage = stage_of(kind, config)
    filled_losses, filled_gradients = losses_and_gradients(stage)
    stage.room = None
    losses, gradients = losses_and_gradients(stage)
    assert len(losses) == len(filled_losses) == 3 * stage.settings.accumulation
    for mine, filled in zip(losses + gradients, filled_losses + filled_gradients, strict=True):
        for name, x in mine.items():
            torch.testing.assert_close(filled[name], x, rtol=1e-4, atol=1e-6 * float(x.abs().max()) + 1e-9)
    stage.engine.close()
