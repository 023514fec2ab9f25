"""What becomes of each key of a DeepSpeed JSON: it works, mtfast has its own setting, or it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

AUTO = "auto"  # of any value: the run's, else DeepSpeed's default
Verdict = Literal["works", "taken over", "refused"]


@dataclass(frozen=True)
class Key:
    """A top-level key.

    text: what works, what to set instead, or why not; for tables and messages.
    default: what DeepSpeed does where the key is not there, and so says nothing.
    """

    verdict: Verdict
    text: str
    default: Any = None


def _works(text: str) -> Key:
    return Key("works", text)


def _taken_over(text: str, default: Any = None) -> Key:
    return Key("taken over", text, default)


def _refused(text: str, default: Any = None) -> Key:
    return Key("refused", text, default)


# Seen with 0.19.8 on a CPU, with plain models of torch's too.
NVME = "a model that DeepSpeed offloads to nvme departs from one that it does not after the first update"
_DROPPED = "DeepSpeed itself has dropped it"
_OTHER_MODELS = "mtfast's models have nothing that it applies to"

KEYS: dict[str, Key] = {
    "optimizer": _works(
        "`AdamW`, or `Adam`, which in DeepSpeed decouples weight decay too. `lr`, `betas` and `weight_decay` "
        "are the stage's: \"auto\", or the same values; `eps` is the JSON's. `engine.optimizer` names the "
        "implementation"
    ),
    "scheduler": _works(
        '`WarmupLR`, `WarmupDecayLR`, `WarmupCosineLR`: DeepSpeed\'s own, in every stage; "auto" is the '
        "stage's learning rate, warm-up (linear, at least two steps) and number of steps"
    ),
    "train_batch_size": _works('"auto", or the stage\'s `batch_size`'),
    "train_micro_batch_size_per_gpu": _works('"auto", or the stage\'s `batch_size` / ranks / `accumulation`'),
    "gradient_accumulation_steps": _works('"auto", or the stage\'s `accumulation`'),
    "gradient_clipping": _works('"auto", or the stage\'s `gradient_clipping`'),
    "bf16": _works('`enabled`: "auto", or as `engine.precision` says; the rest is DeepSpeed\'s'),
    "zero_optimization": _works(
        '`stage`: "auto", or `engine.zero_stage`. `offload_optimizer` (ZeRO 1 to 3) and `offload_param` '
        "(ZeRO 3) to `cpu`; bucket sizes; ZeRO++ (ZeRO 3): `zero_hpz_partition_size`, and quantization on "
        'GPUs, where it was not tried. Other "auto" values are DeepSpeed\'s defaults. Offloading to `nvme` '
        "and ZenFlow are refused, as are MiCS and LoCo, which DeepSpeed has dropped"
    ),
    "zero_allow_untested_optimizer": _works("settled: true"),
    "zero_force_ds_cpu_optimizer": _works(
        "settled: offloaded weights are updated by torch's AdamW, with `engine.optimizer deepspeed-adam` by "
        "DeepSpeed's for the CPU"
    ),
    "communication_data_type": _works("of the sums of gradients over ranks, under ZeRO 1 to 3"),
    "prescale_gradients": _works("over ranks; ZeRO 2 and 3 need `reduce_scatter` false for it"),
    "gradient_predivide_factor": _works("with `prescale_gradients`"),
    "activation_checkpointing": _works(
        "switches `engine.activation_checkpointing` on. Layers keep their inputs whole and on the device: "
        "`partition_activations`, `cpu_checkpointing`, `contiguous_memory_optimization` and "
        "`number_checkpoints` are refused"
    ),
    "tensorboard": _works("the losses of every task, rates and dev metrics of each stage"),
    "wandb": _works("as `tensorboard`"),
    "csv_monitor": _works("as `tensorboard`"),
    "comet": _works("as `tensorboard`"),
    "comms_logger": _works("its summary is printed at the end of each stage"),
    "flops_profiler": _works("counts the operations of mtfast's kernels too"),
    "wall_clock_breakdown": _works("printed in every step"),
    "memory_breakdown": _works("printed in every step"),
    "timers": _works("`throughput` is printed as often as `steps_per_print` says"),
    "steps_per_print": _works("DeepSpeed's own line; mtfast's come every ten seconds"),
    "dump_state": _works("printed at the start of each stage"),
    "log_level": _works("of DeepSpeed's messages, by default warnings"),
    "disable_python_gc": _works("Python's garbage collection is off while a stage trains"),
    "fp16": _taken_over("`engine.precision` is `bf16` or `fp32`"),
    "amp": _taken_over("`engine.precision` is `bf16` or `fp32`"),
    "torch_autocast": _taken_over("`engine.precision`: the heads' stage runs under autocast by itself"),
    "data_types": _taken_over("`engine.precision`: float32 weights and moments, which resumable states hold"),
    "checkpoint": _taken_over("`checkpoint_every` and `keep` of a stage; a thread of the run's own writes"),
    "nebula": _taken_over("`checkpoint_every` and `keep` of a stage"),
    "datastates_ckpt": _taken_over("`checkpoint_every` and `keep` of a stage"),
    "elasticity": _taken_over(
        "the same command: with any number of ranks that divides the batches, a run goes on"
    ),
    "dataloader_drop_last": _taken_over("`sampler`: steps hold every example of an epoch, and all are full"),
    "data_efficiency": _taken_over("`sampler`, and packing, which leaves no padding to save"),
    "curriculum_learning": _taken_over("`sampler`; " + _DROPPED),
    "gradient_allreduce_op": _taken_over("losses are means over the whole step, by task", "mean"),
    "managed_gradient_accumulation": _taken_over("the stage's `accumulation`", True),
    "compile": _taken_over("steps are CUDA graphs"),
    "aio": _refused("it is for offloading to `nvme`: " + NVME),
    "autotuning": _refused(
        "it tries batch sizes, from which results follow, in runs that it launches itself"
    ),
    "pipeline": _refused("a BERT fits one GPU many times; ranks share data"),
    "tensor_parallel": _refused("a BERT fits one GPU many times; ranks share data"),
    "expert_parallel": _refused("there are no experts"),
    "use_data_before_expert_parallelism": _refused("there are no experts"),
    "sequence_parallel_size": _refused("sequences are short; ranks share data", 1),
    "seq_parallel_communication_data_type": _refused("sequences are short; ranks share data", "fp32"),
    "hybrid_engine": _refused("it is for generating text between steps"),
    "compression_training": _refused(_OTHER_MODELS),
    "weight_quantization": _refused(_OTHER_MODELS),
    "quantize_training": _refused(_OTHER_MODELS),
    "sparse_gradients": _refused("gradients of embeddings are dense; " + _DROPPED),
    "sparse_attention": _refused("attention is packed; " + _DROPPED),
    "progressive_layer_drop": _refused(_DROPPED),
    "eigenvalue": _refused(_DROPPED),
    "graph_harvesting": _refused(_DROPPED + "; steps are CUDA graphs by themselves"),
    "disable_allgather": _refused("DeepSpeed reads it and does nothing"),
    "vocabulary_size": _refused("DeepSpeed does nothing with it but warn; the checkpoint has it"),
}


def says_nothing(key: str, value: Any) -> bool:
    """Whether a value leaves everything as it is without the key: a block that is not enabled, say."""
    default = KEYS[key].default
    return _is_off(value) if default is None else value in (default, None, AUTO)


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") in (False, AUTO) or all(map(_is_off, value.values()))
    return value in (None, False, AUTO, [])
