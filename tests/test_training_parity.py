"""Training through the engine against eager twins written with Hugging Face models and torch's AdamW."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from bert_twins import paper_tasks
from transformers import AutoTokenizer, BertForPreTraining, BertModel

from mtfast.commands import open_directory
from mtfast.config import (
    DataConfig,
    EngineConfig,
    HeadsConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    TaskStageConfig,
)
from mtfast.data.tables import read_task
from mtfast.ops import mask_tokens
from mtfast.tasks import MlpConfig, Task
from mtfast.training.engine import engine as engine_module
from mtfast.training.inputs import Inputs, load_reviews
from mtfast.training.loop import train_stage
from mtfast.training.run.directory import RunDirectory
from mtfast.training.run.weights import Weights, find_weights
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain

pytestmark = pytest.mark.sweep

ENGINE = EngineConfig(precision="fp32", zero_stage=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, checkpoint_dir, full_sweep) -> Path:
    """The real checkpoint; unless the sweep is full, two heads and 64 columns of its first two layers."""
    if full_sweep:
        return checkpoint_dir
    directory = tmp_path_factory.mktemp("checkpoint")
    whole = BertModel.from_pretrained(checkpoint_dir, num_hidden_layers=2)
    part = copy.deepcopy(whole.config)
    part.hidden_size, part.num_attention_heads, part.intermediate_size = 64, 2, 256
    assert whole.config.hidden_size // whole.config.num_attention_heads == 32
    weights = whole.state_dict()
    model = BertModel(part)
    model.load_state_dict({n: weights[n][tuple(map(slice, x.shape))] for n, x in model.state_dict().items()})
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def learning_rate(full_sweep) -> float:
    """The smaller model learns at a larger one."""
    return 5e-5 if full_sweep else 1e-3


def tasks_of(head: str = "linear") -> dict[str, Task]:
    """The paper's tasks on a part of their rows."""
    return {name: replace(task, max_rows=500) for name, task in paper_tasks(head).items()}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory, data_dir) -> Path:
    """A file of 40 real reviews."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.parquet"
    some = next(pq.ParquetFile(data_dir / "imdb" / "test.parquet").iter_batches(40, columns=["text"]))
    pq.write_table(pa.Table.from_batches([some]), path)
    return path


@pytest.fixture
def config(tmp_path, data_dir, checkpoint, reviews) -> RunConfig:
    engine_module.start()
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        tasks=tasks_of(),
        model=ModelConfig(checkpoint=str(checkpoint), dropout_p=0.0, mlp=MlpConfig(96)),
        data=DataConfig(
            tasks=str(data_dir / "cs224n"),
            reviews=str(reviews),
            review_max_length=64,
            max_length=64,
        ),
        engine=ENGINE,
    )


def opened(config: RunConfig) -> tuple[RunDirectory, Weights]:
    run = open_directory(config)
    return run, find_weights(config.model, run, config.seed)


def small_tables(config: RunConfig, run: RunDirectory, weights: Weights, split: str, rows: int) -> dict:
    tables = Inputs(config.tasks, config.data, weights.tokenizer, run).load(split)
    return {task: table.select(torch.arange(rows).numpy()) for task, table in tables.items()}


def logged(config: RunConfig, stage: str) -> list[dict]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "step" and r["stage"] == stage]


def compare(ours: list[dict], twin: list[dict[str, float]], steps: int) -> None:
    assert len(ours) == len(twin) == steps
    for record, expected in zip(ours, twin, strict=True):
        for name, value in expected.items():
            assert record["losses"][name] == pytest.approx(value, rel=1e-3), (record["step"], name)


def test_fine_tuning_follows_the_eager_twin_for_50_steps(config, data_dir, checkpoint, learning_rate):
    stage_config = TaskStageConfig(epochs=1, batch_size=12, learning_rate=learning_rate, max_steps=50)
    tasks = config.tasks | {"sts": replace(config.tasks["sts"], weight=0.5)}
    config = replace(config, tasks=tasks, finetune=stage_config)
    run, weights = opened(config)
    rows = {"train": 500, "dev": 8}
    tables = {split: small_tables(config, run, weights, split, count) for split, count in rows.items()}
    stage = Finetune(tables.__getitem__, weights, config.finetune, config.engine, config.seed)
    initial = stage.engine.state_dict()
    plan = stage.plan(0)[:50]

    bert = BertModel.from_pretrained(checkpoint, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    hidden = bert.config.hidden_size
    classifier, dense = torch.nn.Linear(hidden, 5), torch.nn.Linear(2 * hidden, 96)
    out = torch.nn.Linear(96, 2)
    modules = {"task-sst.classifier": classifier, "mlp-pair.mlp.dense": dense, "mlp-pair.mlp.out_proj": out}
    for name, module in modules.items():
        module.load_state_dict({k: initial[f"heads.{name}.{k}"] for k in ("weight", "bias")})
    heads = torch.nn.ModuleList(modules.values())
    optimizer = torch.optim.AdamW(
        [*bert.parameters(), *heads.parameters()], lr=learning_rate, weight_decay=0.01
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    raw = {name: read_task(name, task, data_dir / "cs224n", "train") for name, task in config.tasks.items()}

    def cls(task: str, column: int, rows) -> torch.Tensor:
        texts = [raw[task].texts[column][row] for row in rows]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return bert(**tokens).last_hidden_state[:, 0]

    twin = []
    bert.train()
    for step in plan:
        rows = {task: step.micro_batches[0][task].tolist() for task in raw}
        labels = {task: torch.tensor(raw[task].labels[rows[task]]) for task in raw}
        losses = {"sst": F.cross_entropy(classifier(cls("sst", 0, rows["sst"])), labels["sst"])}
        for output, task in enumerate(("quora", "sts")):
            pair = torch.cat([cls(task, 0, rows[task]), cls(task, 1, rows[task])], dim=1)
            value = out(torch.relu(dense(pair)))[:, output]
            loss = F.binary_cross_entropy_with_logits if task == "quora" else F.mse_loss
            losses[task] = loss(value, labels[task])
        optimizer.zero_grad()
        (losses["sst"] + losses["quora"] + 0.5 * losses["sts"]).backward()
        optimizer.step()
        twin.append({task: loss.item() for task, loss in losses.items()})

    train_stage(stage, run, config.log_every)
    compare(logged(config, "finetune"), twin, 50)
    sts = [losses["sts"] for losses in twin]
    assert sum(sts[-10:]) < sum(sts[:10])  # it did train


def test_pre_training_follows_the_eager_twin_for_20_steps(config, tmp_path, learning_rate):
    config = replace(
        config, pretrain=PretrainConfig(epochs=4, batch_size=4, learning_rate=learning_rate, max_steps=20)
    )
    run, weights = opened(config)
    reviews = load_reviews(config.data, weights.tokenizer, config.seed)
    stage = Pretrain(reviews, weights, config.pretrain, config.engine, config.seed)
    stage.save(tmp_path / "initial", stage.engine.state_dict())
    twin_model = BertForPreTraining.from_pretrained(
        tmp_path / "initial", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    twin_model.train()
    optimizer = torch.optim.AdamW(twin_model.parameters(), lr=learning_rate, weight_decay=0.01)
    seen, original = [], stage.losses
    stage.losses = lambda batch: seen.append(batch) or original(batch)  # type: ignore[method-assign]
    train_stage(stage, run, config.log_every)

    twin = []
    for batch in seen:
        masked = mask_tokens(
            batch.input_ids,
            special_ids=weights.tokenizer.all_special_ids,
            mask_token_id=weights.tokenizer.mask_token_id,
            vocab_size=weights.config.vocab_size,
            seed=batch.mask_seed,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            strategy="exact",
        )
        sizes = batch.cu_seqlens.diff()[: batch.size].tolist()  # without what fills the batch up

        def padded(flat: torch.Tensor, fill: int, sizes=sizes) -> torch.Tensor:
            rows = flat[: sum(sizes)].long().split(sizes)
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

        output = twin_model(
            input_ids=padded(masked.input_ids, 0),
            token_type_ids=padded(batch.token_type_ids, 0),
            attention_mask=padded(torch.ones_like(batch.input_ids), 0),
        )
        labels = padded(masked.labels, -100)
        mlm = F.cross_entropy(output.prediction_logits.flatten(0, 1), labels.flatten())
        nsp = F.cross_entropy(output.seq_relationship_logits, batch.nsp_labels[: batch.size])
        optimizer.zero_grad()
        (mlm + nsp).backward()
        optimizer.step()
        twin.append({"mlm": mlm.item(), "nsp": nsp.item()})
    compare(logged(config, "pretrain"), twin, 20)
    assert twin[-1]["mlm"] < twin[0]["mlm"]


@pytest.mark.parametrize("head", ["linear", "lstm"])
def test_head_training_on_cached_and_live_features_is_the_same_without_dropout(config, head, tmp_path):
    losses = {}
    for features in ("cached", "live"):
        changed = replace(
            config,
            run_dir=str(tmp_path / features),
            tasks=tasks_of(head),
            heads=HeadsConfig(epochs=2, batch_size=64, features=features),
        )
        run, weights = opened(changed)
        tables = {split: small_tables(changed, run, weights, split, 40) for split in ("train", "dev")}
        settings = (changed.heads, changed.engine, changed.seed, tmp_path / "features")
        stage = Heads(tables.__getitem__, weights, *settings)
        before = {k: v.clone() for k, v in stage.encoder.state_dict().items()}
        train_stage(stage, run, changed.log_every)
        assert all(torch.equal(v, before[k]) for k, v in stage.encoder.state_dict().items())
        losses[features] = [record["losses"] for record in logged(changed, "heads")]
    for cached, live in zip(losses["cached"], losses["live"], strict=True):
        assert cached == pytest.approx(live, rel=1e-4)
