"""The configuration, the DeepSpeed JSON made from it, and the run directory's ownership."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtfast import cli, commands
from mtfast.commands import open_directory
from mtfast.config import (
    ConfigError,
    EngineConfig,
    RunConfig,
    TaskStageConfig,
    to_dict,
    validate,
)
from mtfast.data.rows import DataError
from mtfast.experiments import ALL_RECIPES, runs_of
from mtfast.files import to_yaml
from mtfast.recipes import paper
from mtfast.training.engine.deepspeed_config import deepspeed_config
from mtfast.training.run.settings import located
from mtfast.training.schedule import learning_rate_at

STAGE = TaskStageConfig(batch_size=160, learning_rate=1e-5)


def settings(engine: EngineConfig, world_size: int = 1, stage: TaskStageConfig = STAGE) -> dict:
    return deepspeed_config(engine, stage, "finetune", world_size)


def write(tmp_path, values) -> str:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_recipe_is_valid_and_written_whole(name):
    config = ALL_RECIPES[name]()
    validate(config)
    assert yaml.safe_load(to_yaml(to_dict(config))) == to_dict(config)
    assert ALL_RECIPES[name].__doc__


def test_paper_recipe_has_the_papers_numbers():
    config = ALL_RECIPES["paper"]()
    stages = [config.pretrain, config.heads, config.finetune]
    assert [s.epochs for s in stages] == [5, 48, 48]
    assert [s.batch_size for s in stages] == [16, 2048, 160]
    assert [s.learning_rate for s in stages] == [2e-5, 1e-3, 1e-5]
    assert all(
        s.betas == (0.9, 0.999) and s.weight_decay == 0.01 and s.schedule == "constant" for s in stages
    )
    assert config.model.dropout_p == 0.1 and config.model.checkpoint == "bert-base-uncased"
    assert config.pretrain.masking == "static" and config.pretrain.mlm_probability == 0.15
    sst, quora, sts = config.tasks.values()
    assert (sst.kind, quora.kind, sts.kind) == ("classification", "binary", "regression")
    assert sst.head == "linear" and sst.outputs == 5
    assert quora.head == sts.head and quora.has_mlp and quora.pair_input == sts.pair_input == "separate"
    assert config.model.mlp.width == 768 and config.model.mlp.activation == "relu"
    assert {task.weight for task in config.tasks.values()} == {1.0}


def test_experiments_differ_in_one_thing():
    [without], [with_] = runs_of("exp1", ALL_RECIPES["exp1"]()).values()
    assert with_.stages == ("pretrain", "heads", "finetune") and without.stages == ("heads", "finetune")
    assert replace(without, stages=with_.stages, run_dir=with_.run_dir) == with_
    [linear], [lstm] = runs_of("exp2", ALL_RECIPES["exp2"]()).values()
    assert (linear.tasks["sst"].head, lstm.tasks["sst"].head) == ("linear", "lstm")
    lstm_sst = linear.tasks | {"sst": replace(linear.tasks["sst"], head="lstm")}
    assert replace(linear, tasks=lstm_sst, run_dir=lstm.run_dir) == lstm
    assert linear == with_ and lstm.data.cache_dir == "runs/experiments/cache"
    assert runs_of("paper", paper()) == {"": [paper()]}
    others = replace(paper(), tasks={"quora": paper().tasks["quora"]})
    with pytest.raises(ConfigError, match="compares two heads of the task sst, which is not among the tasks"):
        runs_of("exp2", others)


def test_each_variant_has_a_run_with_each_seed():
    config = replace(ALL_RECIPES["exp1"](), seed=4, seeds=3)
    runs = runs_of("exp1", config)
    assert list(runs) == ["without pre-training", "with pre-training"]
    for variant, directory in (("without", "without-pretraining"), ("with", "with-pretraining")):
        of_variant = runs[f"{variant} pre-training"]
        assert [run.seed for run in of_variant] == [4, 5, 6]
        assert [run.run_dir for run in of_variant] == [
            f"runs/experiments/{directory}/seed-{seed}" for seed in (4, 5, 6)
        ]
        first = of_variant[0]
        assert all(replace(run, seed=4, run_dir=first.run_dir) == first for run in of_variant)
    with pytest.raises(ConfigError, match="seeds is 3; exp1 and exp2 have runs with several seeds"):
        runs_of("paper", replace(paper(), seeds=3))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("log_every", 0),
        ("model.dropout_p", 1.0),
        ("model.dropout_p", float("nan")),
        ("model.mlp.width", 0),
        ("data.max_reviews", 0),
        ("data.max_length", 7),
        ("data.review_max_length", 7),
        ("pretrain.mlm_probability", 0.0),
        ("pretrain.max_steps", 0),
        ("finetune.epochs", 0),
        ("heads.batch_size", 0),
        ("finetune.accumulation", 0),
        ("finetune.learning_rate", 0.0),
        ("finetune.learning_rate", float("nan")),
        ("pretrain.learning_rate", float("inf")),
        ("finetune.warmup_fraction", 1.5),
        ("finetune.betas", (0.9, 1.0)),
        ("finetune.betas", (0.9,)),
        ("pretrain.betas", (0.9, 0.99, 0.999)),
        ("finetune.schedule", "step"),
        ("engine.precision", "fp16"),
        ("seed", 2**63),
        ("finetune.learning_rate", 1.7e308),  # its multiple in a warm-up would be infinite
        ("finetune.checkpoint_every", ""),
        ("run_dir", "a\0b"),
        ("data.tasks", "\ud800"),
        ("tasks.sst.source", "~nobody-of-that-name/x"),
        ("tasks.sts.low", float("nan")),
        ("heads.betas", (-0.1, 0.9)),
        ("finetune.weight_decay", -0.01),
        ("finetune.gradient_clipping", -1.0),
        ("finetune.max_skipped", 0),
        ("finetune.checkpoint_every", "0 steps"),
        ("pretrain.checkpoint_every", "often"),
        ("heads.checkpoint_every", 200),
        ("finetune.temperature", 0.0),
        ("heads.temperature", float("nan")),
        ("tasks.sts.weight", -1.0),
        ("tasks.sst.weight", float("inf")),
        ("tasks.quora.max_rows", 0),
        ("tasks.sst.classes", 1),
        ("finetune.patience", 0),
    ],
)
def test_impossible_values_are_named(path, value):
    parts = path.split(".")
    holders: list[Any] = [paper()]
    for part in parts[:-1]:
        holders.append(holders[-1][part] if isinstance(holders[-1], dict) else getattr(holders[-1], part))
    changed: Any = value
    for holder, part in zip(reversed(holders), reversed(parts), strict=True):
        given = {part: changed}
        changed = holder | given if isinstance(holder, dict) else replace(holder, **given)
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{path} is {value!r}; it must ')}\w") as raised:
        validate(changed)
    assert raised.value.field == path


@pytest.mark.parametrize(
    "stages", [(), ("heads", "polish"), ("finetune", "heads"), ("heads", "heads", "finetune")]
)
def test_stages_are_named_once_and_in_order(stages):
    with pytest.raises(ConfigError, match="pretrain heads finetune, each once and in this order"):
        validate(replace(paper(), stages=stages))
    validate(replace(paper(), stages=("pretrain", "finetune")))


def test_a_run_needs_tasks():
    with pytest.raises(ConfigError, match="tasks is empty; declare at least one task"):
        validate(RunConfig())


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_an_error_names_its_field_also_on_another_rank(kind):
    error = pickle.loads(pickle.dumps(kind("a is 3", "model.a")))
    assert type(error) is kind and (str(error), error.field) == ("a is 3", "model.a")
    assert kind("a is 3").field is None


def test_a_stage_is_run_only_for_the_variants_that_have_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # in whose runs/ it is
    trained = []

    def train(config, stage, same_as, listeners) -> None:
        trained.append((config.run_dir, stage, same_as))

    monkeypatch.setattr(commands, "train", train)
    cli.main(["pretrain", "exp1"])
    assert trained == [("runs/experiments/with-pretraining/seed-0", "pretrain", None)]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "paper", "--stages", "heads", "finetune"])
    assert len(trained) == 1 and "not among the run's stages, heads finetune" in capsys.readouterr().err


def test_batch_is_divided_among_ranks_and_accumulation():
    made = settings(EngineConfig(), world_size=4, stage=replace(STAGE, accumulation=5))
    assert made["train_batch_size"] == 160
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 5


def test_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"160 does not divide into 3 rank.* multiple of 3"):
        settings(EngineConfig(), world_size=3)


def test_float32_weights_on_one_rank_run_without_zero(tmp_path):
    def zero_of(engine: EngineConfig, world_size: int) -> int:
        made = deepspeed_config(engine, STAGE, "heads", world_size, float32=True)
        assert made["bf16"]["enabled"] is False
        return made["zero_optimization"]["stage"]

    assert zero_of(EngineConfig(zero_stage=2), 1) == 0
    assert zero_of(EngineConfig(zero_stage=2), 2) == 2
    path = write(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert zero_of(EngineConfig(zero_stage=2, deepspeed_config=path), 1) == 2  # a user's own ZeRO options


def test_directory_of_another_config_is_refused_and_untouched(tmp_path):
    config = RunConfig(run_dir=str(tmp_path / "run"))
    open_directory(config).append([{"stage": "heads", "step": 1}])
    before = (tmp_path / "run" / "config.yaml").read_text()
    open_directory(config)  # the same configuration continues
    with pytest.raises(
        ConfigError, match=r"belongs to a run with another.*\n  finetune\.batch_size: 160 there, 3 here"
    ):
        open_directory(replace(config, finetune=TaskStageConfig(batch_size=3)))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_false_start_does_not_keep_the_directory(tmp_path):
    wrong = RunConfig(run_dir=str(tmp_path / "run"), seed=1)
    open_directory(wrong).summarize(data={"sst-train": {"read": 1}})
    right = replace(wrong, seed=2)
    with pytest.raises(ConfigError, match="holds no run with this configuration"):
        open_directory(right, create=False)
    assert open_directory(right).summarize() == {"config": to_dict(located(right))}
    open_directory(right, create=False)
    with pytest.raises(ConfigError, match="nowhere holds no run"):
        open_directory(replace(right, run_dir=str(tmp_path / "nowhere")), create=False)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("text", ["a: [", "3", "\xff"])
def test_a_directory_whose_config_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.yaml (cannot be read|is not a run's configuration)"):
        open_directory(RunConfig(run_dir=str(tmp_path)))


def test_directory_with_foreign_metrics_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        open_directory(RunConfig(run_dir=str(tmp_path)))


def test_rewind_drops_what_will_run_again_and_a_torn_line(tmp_path):
    run = open_directory(RunConfig(run_dir=str(tmp_path / "run")))
    run.append([{"stage": "heads", "step": 9}, *({"stage": "finetune", "step": s} for s in range(1, 6))])
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "fine')
    run.rewind("finetune", 3)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in kept] == [
        ("heads", 9),
        ("finetune", 1),
        ("finetune", 2),
        ("finetune", 3),
    ]


def test_an_interrupted_take_over_is_made_up_for(tmp_path, monkeypatch):
    other, run = (open_directory(RunConfig(run_dir=str(tmp_path / name))) for name in ("other", "run"))
    assert not run.take_over("pretrain", other.path)  # not finished there
    other.stage("pretrain").mkdir()
    (other.stage("pretrain") / "weights").write_text("1")
    other.append([{"stage": "pretrain", "step": 1}, {"stage": "heads", "step": 1}])
    other.finish_stage("pretrain", {"summary": {"steps": 1}})

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as last_moment, pytest.raises(KeyboardInterrupt):
        last_moment.setattr(Path, "rename", interrupt)
        run.take_over("pretrain", other.path)
    assert not run.stage("pretrain").exists()
    assert run.take_over("pretrain", other.path)
    assert (run.stage("pretrain") / "weights").read_text() == "1"
    assert (run.path / "metrics.jsonl").read_text() == '{"stage": "pretrain", "step": 1}\n'
    assert not list(run.path.glob("*.partial"))
    assert not run.take_over("pretrain", other.path)  # begun here


def test_learning_rate_schedules():
    def rates(schedule: str) -> list[float]:
        stage = TaskStageConfig(learning_rate=1.0, schedule=schedule, warmup_fraction=0.2)
        return [learning_rate_at(stage, step, 10) for step in range(10)]

    assert rates("constant") == [0.5, 1.0] + [1.0] * 8
    assert rates("linear") == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])
    assert rates("cosine")[2] == 1.0 and rates("cosine")[6] == pytest.approx(0.5)
