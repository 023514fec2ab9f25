"""The configuration of a run: frozen dataclasses whose field docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mtfast.packages import explained

with explained():
    import tyro

from mtfast.errors import FieldError, shown
from mtfast.hints import PATH_WANTED, fits, in_words, is_path, settings
from mtfast.interval import WANTED, is_interval
from mtfast.tasks import MlpConfig, Task, fault_of, fault_of_mlps

StageName = Literal["pretrain", "heads", "finetune"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)
LoggerName = Literal["tensorboard", "wandb"]
CONFIG_FILE = "config.yaml"  # in a run's directory: what it was made with


class ConfigError(FieldError):
    """A configuration that cannot be run; the message names the field and what would be right."""


@dataclass(frozen=True)
class ModelConfig:
    checkpoint: str = "bert-base-uncased"
    """BERT to start from: a Hugging Face name or a directory in Hugging Face layout."""
    from_scratch: bool = False
    """Read only the architecture and the tokenizer of the checkpoint and start from random weights."""
    dropout_p: float = 0.1
    """Dropout probability everywhere: embeddings, attention, hidden layers and heads."""
    mlp: MlpConfig = field(default_factory=MlpConfig)


@dataclass(frozen=True)
class DataConfig:
    tasks: str = "data/cs224n"
    """Directory with the CS 224N files, for the tasks that name no source of their own."""
    reviews: str = "stanfordnlp/imdb"
    """Movie reviews for further pre-training: a Hugging Face data set, a directory or one file."""
    max_reviews: int | None = None
    """Use only this many reviews."""
    max_length: int = 128
    """Longest sequence of the tasks in word pieces; longer ones are cut and counted."""
    review_max_length: int = 512
    """Longest pre-training sample in word pieces."""
    samples: Literal["runs", "truncate"] = "runs"
    """Pre-training samples of a review: as many as hold all its sentences, or one with the first that fit."""
    strict: Annotated[bool, tyro.conf.arg(aliases=["--strict"])] = False
    """Stop at the first row that cannot be used instead of counting and naming it."""
    cache_dir: str | None = None
    """Where tokenized data is kept; by default `cache/` in the directory of the run or the experiment."""


@dataclass(frozen=True)
class EngineConfig:
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations in the steps; the optimizer always holds float32 weights."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage: what is sharded over the ranks (1 optimizer state, 2 gradients, 3 weights). None
    is 0 for one process and 1 for several; in bf16 several run 0 as 1."""
    optimizer: Literal["adamw", "deepspeed-adam", "apex-adam"] = "adamw"
    """torch's fused AdamW, DeepSpeed's FusedAdam, or NVIDIA apex's FusedAdam."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, slower."""
    deepspeed_config: Annotated[str | None, tyro.conf.arg(aliases=["--deepspeed-config"])] = None
    """A DeepSpeed JSON file merged into the engine's; "auto" values are filled from this configuration."""


@dataclass(frozen=True)
class StageConfig:
    epochs: int = 1
    """Passes over the training data."""
    batch_size: int = 160
    """Examples per optimizer step, over all ranks and accumulation steps."""
    accumulation: int = 1
    """Micro-batches per optimizer step on each rank."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: fixed, or falling to zero at the last step."""
    warmup_fraction: float = 0.0
    """Part of all steps over which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = True
    """Decay every parameter (the paper's plain setting); false spares biases and LayerNorm."""
    gradient_clipping: float = 0.0
    """Largest global gradient norm; 0 does not clip."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite gradient does: stop the run, or skip the update of its step. To know in time,
    `skip` waits for the device in every step, and steps are no CUDA graphs."""
    max_skipped: int = 3
    """With `skip`, stop the run after more than so many steps in a row were left out."""
    checkpoint_every: str = "1 epoch"
    """How often the resumable state is saved, besides at the stage's end: "200 steps", "5 epochs" or
    "10 minutes", say."""
    keep: int = 2
    """How many resumable states stay. Where the newest is damaged, the run goes on from the one before."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    epochs: int = 5
    """Passes over the reviews."""
    batch_size: int = 16
    """Samples (segment pairs) per optimizer step, over all ranks and accumulation steps."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    masking: Literal["static", "dynamic"] = "static"
    """Mask once for all epochs (the paper), or draw anew in each epoch."""
    mlm_probability: float = 0.15
    """Part of the tokens chosen for prediction; of those 80% become [MASK], 10% a random token."""
    head_steps: int = 0
    """First steps, in which the MLM and NSP heads alone are trained: a checkpoint that has none begins with
    fresh ones, whose gradients would distort its encoder (Kumar et al. 2022, https://arxiv.org/abs/2202.10054)."""
    head_learning_rate: float = 1e-3
    """Learning rate of those steps, fixed; the schedule begins after them."""


@dataclass(frozen=True)
class TaskStageConfig(StageConfig):
    epochs: int = 48
    """Passes over the training data of all tasks."""
    sampler: Literal["proportional", "temperature", "round_robin"] = "proportional"
    """How tasks share a step: by size (every example once), by size^(1/temperature), or equally."""
    temperature: float = 2.0
    """Temperature of the `temperature` sampler."""
    patience: int | None = None
    """Stop when the mean dev metric has not risen for this many epochs."""


@dataclass(frozen=True)
class HeadsConfig(TaskStageConfig):
    batch_size: int = 2048
    """Examples per optimizer step, over all ranks and accumulation steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    features: Literal["cached", "live"] = "cached"
    """Encode the data once, without dropout, or run the frozen encoder in every step with its dropout on."""


@dataclass(frozen=True)
class RunConfig:
    run_dir: str = "runs/run"
    """Everything the run writes goes here; the same command continues an interrupted run."""
    stages: tuple[StageName, ...] = STAGES
    """Stages that `run` goes through: some of the three, in this order."""
    seed: int = 0
    """Seed of data order, masking, initial weights and dropout."""
    seeds: int = 1
    """Of an experiment: runs of each variant, with as many seeds from `seed` on."""
    log_every: int = 10
    """Steps between two reads of the losses from the device."""
    log: tuple[LoggerName, ...] = ()
    """Where curves go besides metrics.jsonl: to TensorBoard's files, `tensorboard/` in the run's directory;
    to Weights & Biases, whose own settings (WANDB_MODE, WANDB_PROJECT) apply."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """The tasks that heads and encoder are trained on, by name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    finetune: TaskStageConfig = field(default_factory=TaskStageConfig)

    @property
    def path(self) -> Path:
        return Path(self.run_dir).expanduser()

    def stage(self, name: StageName) -> StageConfig:
        return getattr(self, name)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict of a config, as it is written to `config.yaml`."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


Rule = tuple[str, Callable[[Any], bool]]


def _at_least(low: int) -> Rule:
    return f"be at least {low}", lambda value: low <= value < math.inf


# Up to what a weight can hold.
_POSITIVE: Rule = "be positive and at most 1e38", lambda value: 0.0 < value <= 1e38
_NOT_NEGATIVE: Rule = "be at least 0 and at most 1e38", lambda value: 0.0 <= value <= 1e38

_A_PATH: Rule = (PATH_WANTED, is_path)
_IN_ORDER: Rule = (
    f"name some of {' '.join(STAGES)}, each once and in this order",
    lambda names: list(names) == [name for name in STAGES if name in names] != [],
)

_RULES: dict[str, Rule] = {
    "stages": _IN_ORDER,
    "log": (
        f"name some of {' '.join(typing.get_args(LoggerName))}, each once",
        lambda names: len(set(names)) == len(names),
    ),
    "run_dir": _A_PATH,
    "model.checkpoint": _A_PATH,
    "data.tasks": _A_PATH,
    "data.reviews": _A_PATH,
    "data.cache_dir": _A_PATH,
    "engine.deepspeed_config": _A_PATH,
    "seed": _at_least(0),
    "seeds": _at_least(1),
    "log_every": _at_least(1),
    "model.dropout_p": ("lie in [0, 1)", lambda value: 0.0 <= value < 1.0),
    "model.mlp.width": _at_least(1),
    "data.max_reviews": _at_least(1),
    "data.max_length": _at_least(8),
    "data.review_max_length": _at_least(8),
    "pretrain.mlm_probability": ("lie in (0, 1)", lambda value: 0.0 < value < 1.0),
    "pretrain.head_steps": _at_least(0),
    "pretrain.head_learning_rate": _POSITIVE,
}
_STAGE_RULES: dict[str, Rule] = {
    "epochs": _at_least(1),
    "batch_size": _at_least(1),
    "accumulation": _at_least(1),
    "learning_rate": _POSITIVE,
    "warmup_fraction": ("lie in [0, 1]", lambda value: 0.0 <= value <= 1.0),
    "betas": ("be two numbers in [0, 1)", lambda values: all(0.0 <= value < 1.0 for value in values)),
    "weight_decay": _NOT_NEGATIVE,
    "gradient_clipping": _NOT_NEGATIVE,
    "max_skipped": _at_least(1),
    "checkpoint_every": (WANTED, is_interval),
    "keep": _at_least(1),
    "max_steps": _at_least(1),
    "temperature": _at_least(1),
    "patience": _at_least(1),
}
_ALL_RULES = _RULES | {f"{name}.{field}": rule for name in STAGES for field, rule in _STAGE_RULES.items()}


def rule_of(field: str) -> str | None:
    """What a field's value must do, "be at least 1" say; None where any of its type will do."""
    return _ALL_RULES[field][0] if field in _ALL_RULES else None


def validate(config: RunConfig) -> None:
    """Raises ConfigError for values that no run could use, naming the field."""
    for path, hint, value in settings(config):
        rule, holds = _ALL_RULES.get(path, (None, None))
        if not fits(value, hint):
            # The rules of texts and tuples say what they are.
            ruled = rule if hint is str or typing.get_origin(hint) is tuple else None
            raise ConfigError(f"{path} is {shown(value)}; it must {ruled or f'be {in_words(hint)}'}", path)
        if value is not None and holds is not None and not holds(value):
            raise ConfigError(f"{path} is {shown(value)}; it must {rule}", path)
    if not config.tasks:
        raise ConfigError("tasks is empty; declare at least one task", "tasks")
    for name, task in config.tasks.items():
        if found := fault_of(name, task):
            raise ConfigError(f"tasks.{name}{found.text}", f"tasks.{name}.{found.field}".rstrip("."))
    if found := fault_of_mlps(config.tasks):
        raise ConfigError(found.text, found.field)
