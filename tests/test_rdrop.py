"""R-Drop's examples twice, as fine-tuning takes them."""

from dataclasses import replace

import pytest
import torch
from stages import demo_on, stage_of
from torch import Tensor

from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.training.stages.finetune import Finetune


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


def joint(corpus, run_dir, alphas, **settings):
    """The demo, its pairs joint, without dropout; alphas: of R-Drop, by task."""
    config = demo_on(corpus, run_dir)
    tasks = {
        name: replace(task, pair_input="joint") if len(task.texts) == 2 else task
        for name, task in config.tasks.items()
    }
    tasks |= {name: replace(tasks[name], rdrop_alpha=alpha) for name, alpha in alphas.items()}
    return replace(
        config,
        tasks=tasks,
        model=replace(config.model, dropout_p=0.0),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        **settings,
    )


def gradients(stage: Finetune, number: int) -> list[Tensor]:
    """Of the loss of a step's micro-batches, added up."""
    module = stage.engine.model = stage.engine.model.module  # no engine
    for batches in stage.micro_batches(stage.plan(0)[number : number + 1], 0):
        for batch in batches:
            stage.total(stage.losses(batch)).backward()
    return [p.grad.clone() for p in module.parameters()]


def test_without_dropout_rdrop_changes_nothing(corpus, tmp_path):
    """Both outputs of an example are equal; it counts once, as it does without."""
    found = []
    for alphas in ({}, {"sst": 4.0, "sts": 1.0}):
        settings = TaskStageConfig(batch_size=24, accumulation=2)
        stage = stage_of(Finetune, joint(corpus, tmp_path / str(len(alphas)), alphas, finetune=settings))
        (batches,) = stage.micro_batches(stage.plan(0)[:1], 0)
        rows = [{name: len(rows.labels) for name, rows in batch.tasks.items()} for batch in batches]
        found.append(([batch.size for batch in batches], rows, gradients(stage, 1)))
        stage.engine.close()
    (sizes, plain_rows, plain), (same_sizes, rows, ours) = found
    assert sizes == same_sizes and sum(sizes) <= 24
    for before, after in zip(plain_rows, rows, strict=True):
        assert after == before | {name: 2 * before[name] for name in ("sst", "sts")}
    for x, y in zip(plain, ours, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6 * float(x.abs().max()) + 1e-9)


def test_an_examples_two_passes_differ_in_their_dropout(corpus, tmp_path):
    alphas = dict.fromkeys(("sst", "quora", "sts"), 1.0)
    config = joint(corpus, tmp_path, alphas, finetune=TaskStageConfig(batch_size=24))
    stage = stage_of(Finetune, replace(config, model=replace(config.model, dropout_p=0.3)))
    ((batch,),) = stage.micro_batches(stage.plan(0)[:1], 0)
    outputs = stage.engine.model(**batch.model_inputs())
    for name, found in outputs.items():
        labels = batch.tasks[name].labels
        assert torch.equal(labels[0::2], labels[1::2])
        assert ((found[0::2] - found[1::2]).abs() > 1e-6).any(), name
    stage.engine.close()
