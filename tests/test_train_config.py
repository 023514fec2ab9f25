"""The configuration, the DeepSpeed JSON made from it, and the run directory's ownership."""

import json
from dataclasses import replace

import pytest

from mtfast import cli
from mtfast.recipes import RECIPES, variants
from mtfast.train.config import (
    ConfigError,
    EngineConfig,
    RunConfig,
    TaskStageConfig,
    from_dict,
    to_dict,
    validate,
)
from mtfast.train.deepspeed_config import deepspeed_config
from mtfast.train.loop import learning_rate_at
from mtfast.train.rundir import RunDirectory

STAGE = TaskStageConfig(batch_size=160, learning_rate=1e-5)


def settings(engine: EngineConfig, world_size: int = 1, stage: TaskStageConfig = STAGE) -> dict:
    return deepspeed_config(engine, stage, "finetune", world_size)


def write(tmp_path, values) -> str:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_survives_yaml_values(name):
    config = RECIPES[name]()
    validate(config)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert RECIPES[name].__doc__


def test_paper_recipe_has_the_papers_numbers():
    config = RECIPES["paper"]()
    stages = [config.pretrain, config.heads, config.finetune]
    assert [s.epochs for s in stages] == [5, 48, 48]
    assert [s.batch_size for s in stages] == [16, 2048, 160]
    assert [s.learning_rate for s in stages] == [2e-5, 1e-3, 1e-5]
    assert all(
        s.betas == (0.9, 0.999) and s.weight_decay == 0.01 and s.schedule == "constant" for s in stages
    )
    assert config.model.dropout_p == 0.1 and config.model.checkpoint == "bert-base-uncased"
    assert config.pretrain.masking == "static" and config.pretrain.mlm_probability == 0.15
    assert config.model.pair_input == "separate" and config.model.sentiment_head == "linear"


def test_experiments_differ_in_one_thing():
    without, with_ = variants(RECIPES["exp1"]()).values()
    assert with_.stages == ("pretrain", "heads", "finetune") and without.stages == ("heads", "finetune")
    assert replace(without, stages=with_.stages, run_dir=with_.run_dir) == with_
    linear, lstm = variants(RECIPES["exp2"]()).values()
    assert (linear.model.sentiment_head, lstm.model.sentiment_head) == ("linear", "lstm")
    assert replace(linear, model=lstm.model, run_dir=lstm.run_dir) == lstm


def test_unknown_field_is_named():
    with pytest.raises(ConfigError, match=r"config\.finetune: unknown field 'epoch'"):
        from_dict({"finetune": {"epoch": 3}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": TaskStageConfig(epochs=0)}, r"finetune\.epochs is 0"),
        ({"finetune": TaskStageConfig(learning_rate=0.0)}, r"finetune\.learning_rate is 0"),
        ({"stages": ("heads", "polish")}, "stages names 'polish'"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(replace(RunConfig(), **changes))


def test_batch_is_divided_among_ranks_and_accumulation():
    made = settings(EngineConfig(), world_size=4, stage=replace(STAGE, accumulation=5))
    assert made["train_batch_size"] == 160
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 5


def test_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"160 does not divide into 3 rank.* multiple of 3"):
        settings(EngineConfig(), world_size=3)


def test_user_json_is_merged_and_auto_filled(tmp_path):
    path = write(
        tmp_path,
        {
            "train_batch_size": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto", "overlap_comm": False},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01}},
            "comms_logger": {"enabled": False},
        },
    )
    made = settings(EngineConfig(zero_stage=2, deepspeed_config=path))
    assert made["train_batch_size"] == 160 and made["bf16"]["enabled"] is True
    assert made["zero_optimization"]["stage"] == 2 and made["zero_optimization"]["overlap_comm"] is False
    assert made["comms_logger"] == {"enabled": False}
    assert "optimizer" not in made  # it is handed over as an object


def test_a_users_json_has_the_last_word_on_what_the_run_does_not_decide(tmp_path):
    path = write(
        tmp_path,
        {
            "timers": {"throughput": {"enabled": True}},
            "bf16": {"check_grad_overflow": True},
            "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        },
    )
    made = settings(EngineConfig(zero_stage=2, deepspeed_config=path))
    assert made["timers"]["throughput"]["enabled"] is True and made["bf16"]["check_grad_overflow"] is True
    assert "compute_grad_norm" not in made["zero_optimization"]  # DeepSpeed's offload needs the norm


def test_float32_weights_on_one_rank_run_without_zero(tmp_path):
    def zero_of(engine: EngineConfig, world_size: int) -> int:
        made = deepspeed_config(engine, STAGE, "heads", world_size, float32=True)
        assert made["bf16"]["enabled"] is False
        return made["zero_optimization"]["stage"]

    assert zero_of(EngineConfig(zero_stage=2), 1) == 0
    assert zero_of(EngineConfig(zero_stage=2), 2) == 2
    path = write(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert zero_of(EngineConfig(zero_stage=2, deepspeed_config=path), 1) == 2  # a user's own ZeRO options
    with pytest.raises(ConfigError, match=r"bf16\.enabled: the JSON says False, the run True"):
        zero_of(EngineConfig(deepspeed_config=write(tmp_path, {"bf16": {"enabled": False}})), 1)


def test_every_contradiction_is_named(tmp_path):
    path = write(
        tmp_path,
        {
            "train_batch_size": 64,
            "zero_optimization": {"stage": 3},
            "optimizer": {"params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR"},
        },
    )
    with pytest.raises(ConfigError) as error:
        settings(EngineConfig(zero_stage=1, deepspeed_config=path))
    text = str(error.value)
    for wanted in (
        "train_batch_size: the JSON says 64, the run 160",
        "zero_optimization.stage: the JSON says 3, the run 1",
        "optimizer.params.lr: the JSON says 0.001, the run 1e-05",
        "scheduler",
        '"auto"',
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[1]", "JSON object"), (None, "No such file")]
)
def test_unreadable_json(tmp_path, content, message):
    path = str(tmp_path / "absent.json") if content is None else write(tmp_path, content)
    with pytest.raises(ConfigError, match=message):
        settings(EngineConfig(deepspeed_config=path))


def test_directory_of_another_config_is_refused_and_untouched(tmp_path):
    config = RunConfig(run_dir=str(tmp_path / "run"))
    RunDirectory(config)
    before = (tmp_path / "run" / "config.yaml").read_text()
    RunDirectory(config)  # the same configuration continues
    with pytest.raises(
        ConfigError, match=r"belongs to a run with another.*\n  finetune\.epochs: 48 there, 3 here"
    ):
        RunDirectory(replace(config, finetune=TaskStageConfig(epochs=3)))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_directory_with_foreign_metrics_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        RunDirectory(RunConfig(run_dir=str(tmp_path)))


def test_rewind_drops_what_will_run_again_and_a_torn_line(tmp_path):
    run = RunDirectory(RunConfig(run_dir=str(tmp_path / "run")))
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


def test_learning_rate_schedules():
    def rates(schedule: str) -> list[float]:
        stage = TaskStageConfig(learning_rate=1.0, schedule=schedule, warmup_fraction=0.2)
        return [learning_rate_at(stage, step, 10) for step in range(10)]

    assert rates("constant") == [0.5, 1.0] + [1.0] * 8
    assert rates("linear") == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])
    assert rates("cosine")[2] == 1.0 and rates("cosine")[6] == pytest.approx(0.5)


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "0"]])
def test_launchers_rank_flag_is_accepted(flag, capsys):
    cli.main(["prepare", "paper", *flag, "--finetune.epochs", "2", "--print-config"])
    assert "epochs: 2" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--deepspeed_config", "ds.json"], ["--engine.deepspeed-config=ds.json"]])
def test_short_flags_are_the_dotted_ones(flag, capsys):
    cli.main(["finetune", "paper", *flag, "--strict", "--print-config"])
    printed = capsys.readouterr().out
    assert "deepspeed_config: ds.json" in printed and "strict: true" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly", "paper"], "no command 'fly'"),
        (["run", "papier"], "no recipe 'papier'"),
        (["run", "paper", "--model.dropout-p", "1.5"], r"model.dropout_p is 1.5"),
    ],
)
def test_command_line_errors_are_plain_sentences(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "paper", "--help"])
    text = capsys.readouterr().out
    for option in ("--finetune.batch-size", "--engine.zero-stage", "--heads.features", "--data.strict"):
        assert option in text
    assert "Largest global gradient norm" in text
