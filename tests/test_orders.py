"""Symmetric pairs in both orders of their texts, and R-Drop's examples twice, as fine-tuning takes them."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from paper_tables import table_of
from small_run import some_texts
from small_tokenizer import small_tokenizer
from stages import demo_on, stage_of
from torch import Tensor

from mtfast.config import EngineConfig, HeadsConfig, TaskStageConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.data.tokens import TokenizedTask, tokenize_task
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


def tokenized(pair_input: str, first: list[str], second: list[str], max_length: int) -> TokenizedTask:
    table = table_of("quora", first, second, labels=[i % 2 for i in range(len(first))])
    table = replace(table, task=replace(table.task, pair_input=pair_input, symmetric=True))
    return tokenize_task(table, small_tokenizer(), max_length=max_length)


def sequences_of(table: TokenizedTask) -> list[tuple[list[int], int]]:
    """The tokens of each sequence, and where its second segment begins."""
    parts = np.split(table.sequences.tokens, table.sequences.offsets[1:-1])
    return list(zip(map(list, parts), table.sequences.segment_b_start.tolist(), strict=True))


@pytest.mark.parametrize("pair_input", ["separate", "joint"])
def test_the_other_order_is_that_of_the_exchanged_texts(pair_input):
    first, second = some_texts(40), some_texts(40, seed=1)
    both = tokenized(pair_input, first, second, 64).in_both_orders()
    given, exchanged = tokenized(pair_input, first, second, 64), tokenized(pair_input, second, first, 64)
    assert sequences_of(both) == sequences_of(given) + sequences_of(exchanged)
    assert both.labels.tolist() == 2 * given.labels.tolist() and both.ids == 2 * given.ids
    assert both.lengths.tolist() == 2 * given.lengths.tolist()


def test_both_orders_of_a_pair_that_was_cut_have_the_same_word_pieces():
    first, second = some_texts(40), some_texts(40, seed=1)
    found = sequences_of(tokenized("joint", first, second, 13).in_both_orders())
    for (given, begin), (other, other_begin) in zip(found[:40], found[40:], strict=True):
        assert other == given[:1] + given[begin:] + given[1:begin]
        assert other[:1] + other[other_begin:] + other[1:other_begin] == given


def symmetric(corpus, run_dir, alphas=(), **settings):
    """The demo, its pairs joint and of no order, without dropout; alphas: of R-Drop, by task."""
    config = demo_on(corpus, run_dir)
    tasks = {
        name: replace(task, pair_input="joint", symmetric=True) if len(task.texts) == 2 else task
        for name, task in config.tasks.items()
    }
    tasks |= {name: replace(tasks[name], rdrop_alpha=alpha) for name, alpha in dict(alphas).items()}
    return replace(
        config,
        tasks=tasks,
        model=replace(config.model, dropout_p=0.0),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        **settings,
    )


def rows_by_task(steps: Iterable) -> dict[str, Tensor]:
    parts = [part for step in steps for part in step.micro_batches]
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def test_the_orders_take_turns_and_every_example_has_one_of_them_in_an_epoch(corpus, tmp_path):
    stage = stage_of(Finetune, symmetric(corpus, tmp_path, finetune=TaskStageConfig(batch_size=24)))
    epochs = [rows_by_task(stage.plan(epoch)) for epoch in (0, 1)]
    for name, count in stage.examples.items():
        turned = [(rows >= count).sum().item() for rows in (epoch[name] for epoch in epochs)]
        if name == "sst":
            assert turned == [0, 0] and len(stage.train[name]) == count
            continue
        assert turned == [count // 2, count - count // 2] and len(stage.train[name]) == 2 * count
        for epoch in epochs:
            assert (epoch[name] % count).sort().values.tolist() == list(range(count))
        assert sorted(torch.cat([epoch[name] for epoch in epochs]).tolist()) == list(range(2 * count))
    stage.engine.close()


@pytest.mark.parametrize("features", ["cached", "live"])
def test_predictions_of_the_heads_stage_are_means_over_both_orders(features, corpus, tmp_path):
    config = symmetric(corpus, tmp_path, heads=HeadsConfig(features=features))
    bert = shutil.copytree(corpus.bert, tmp_path / "bert")
    file = bert / "config.json"  # random weights so large that the order matters
    file.write_text(json.dumps(json.loads(file.read_text()) | {"initializer_range": 0.3}))
    config = replace(config, model=replace(config.model, checkpoint=str(bert)))
    stage = stage_of(Heads, config)
    stage.engine.train(False)
    found = stage.predict_dev()["sts"]
    model = stage_of(Finetune, replace(config, run_dir=str(tmp_path / "plain")))
    model.engine._module.load_state_dict(
        stage.encoder.state_dict(prefix="encoder.") | stage.engine._module.state_dict(prefix="heads.")
    )
    model.engine.train(False)
    table = stage.dev["sts"]
    plain = replace(table, task=replace(table.task, symmetric=False))
    both = plain.in_both_orders()
    model.dev = {name: x for name, x in stage.dev.items() if name != "sts"} | {"sts": both}
    each = model.predict_dev()["sts"]
    one, other = np.split(each, 2)
    assert np.abs(one - other).max() > 1e-2
    assert found == pytest.approx((one + other) / 2, abs=1e-5)
    stage.engine.close()
    model.engine.close()


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
        stage = stage_of(Finetune, symmetric(corpus, tmp_path / str(len(alphas)), alphas, finetune=settings))
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
    config = symmetric(corpus, tmp_path, alphas, finetune=TaskStageConfig(batch_size=24))
    stage = stage_of(Finetune, replace(config, model=replace(config.model, dropout_p=0.3)))
    ((batch,),) = stage.micro_batches(stage.plan(0)[:1], 0)
    outputs = stage.engine.model(**batch.model_inputs())
    for name, found in outputs.items():
        labels = batch.tasks[name].labels
        assert torch.equal(labels[0::2], labels[1::2])
        assert ((found[0::2] - found[1::2]).abs() > 1e-6).any(), name
    stage.engine.close()
