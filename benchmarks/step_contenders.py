"""Who takes part in `python -m benchmarks steps`: each stage's contenders, all from the same weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, BertModel

from benchmarks.eager_twin import VARLEN, EagerHeads, EagerTwin, MasterAdamW
from benchmarks.mask_tokens import masking_by_where
from benchmarks.step_batches import (
    TASKS,
    CachedFeatures,
    FinetuneBatch,
    HeadsBatch,
    HfReviews,
    PretrainBatch,
    cached_features,
    finetune_batch,
    first_then_second,
    heads_batch,
    pretrain_batch,
)
from benchmarks.timing import graph_of
from mtfast.data.packing import TaskRows
from mtfast.kinds import task_losses
from mtfast.models.multitask import MultiTaskHeads, MultiTaskModel, build_multitask_model
from mtfast.models.names import hf_state_dict
from mtfast.models.pretraining import PretrainModel, build_pretrain_model
from mtfast.ops import mask_tokens
from mtfast.tasks import MlpConfig
from mtfast.training.engine.graphs import CudaRecorder, StepGraphs

DROPOUT_P = 0.1
Losses = dict[str, Tensor]
Step = Callable[[Any], Tensor]


class Contender(ABC):
    """One way to train a stage's model, in float32 until `training`.

    compiled: parts of it are compiled, for each precision anew. captured: the step is a CUDA graph.
    """

    learning_rate = 1e-5
    compiled = captured = False
    optimizer: Any

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @abstractmethod
    def losses(self, batch: Any) -> Losses:
        """The losses of a batch, scalars by name."""

    def fixed_losses(self, batch: Any) -> Losses:
        """The losses of a batch in which nothing is drawn but dropout."""
        return self.losses(batch)

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this precision."""
        self.model.to(dtype)

    def training(self) -> Step:
        """Go over to training, in bf16 and with dropout; the step, which returns the sum of its losses."""
        self.cast(torch.bfloat16)
        self.model.train()
        self.optimizer = MasterAdamW(self.model, self.learning_rate)
        return self.step

    def step(self, batch: Any) -> Tensor:
        """Forward pass, losses, backward pass and optimizer."""
        loss = torch.stack(list(self.losses(batch).values())).sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class PackedPretrain(Contender):
    """mtfast's pre-training step, as mtfast/training/stages/pretrain.py has it."""

    def __init__(self, source: PretrainModel) -> None:
        super().__init__(copy.deepcopy(source))

    def losses(self, batch: PretrainBatch) -> Losses:
        packed = batch.packed
        masked = mask_tokens(
            packed.input_ids, positions=packed.positions, cu_seqlens=packed.cu_seqlens, **batch.masking
        )
        chosen = torch.nonzero_static(masked.labels != -100, size=packed.masked, fill_value=0).squeeze(1)
        inputs = packed.encoder_inputs() | {"input_ids": masked.input_ids}
        words, order = self.model(**inputs, masked_rows=chosen, samples=len(packed.nsp_labels))
        mlm = F.cross_entropy(words, masked.labels[chosen].long(), reduction="sum") * packed.mlm_weight[0]
        nsp = F.cross_entropy(order, packed.nsp_labels, reduction="none") * packed.nsp_weights
        return {"mlm + nsp": mlm + nsp.sum()}


class PaddedPretrain(Contender):
    """BertForPreTraining on padded samples, masked as Hugging Face's collator does, but on the device."""

    attention = "sdpa"

    def __init__(self, source: PretrainModel, compiled: bool = False) -> None:
        super().__init__(twin_of(BertForPreTraining, source, self.attention))
        self.masking = masking_by_where
        self.compiled = compiled
        if compiled:
            self.model.compile(dynamic=True)
            self.masking = torch.compile(masking_by_where, dynamic=True)

    def losses(self, batch: PretrainBatch) -> Losses:
        reviews = self.layout(batch)
        return self.of_masked(batch, *self.masking(reviews.inputs["input_ids"], reviews.special))

    def fixed_losses(self, batch: PretrainBatch) -> Losses:
        return self.of_masked(batch, *self.layout(batch).masked)

    def layout(self, batch: PretrainBatch) -> HfReviews:
        """The samples as the model takes them."""
        return batch.padded

    def of_masked(self, batch: PretrainBatch, input_ids: Tensor, labels: Tensor) -> Losses:
        """The losses with these words masked."""
        reviews = batch.padded
        inputs = reviews.inputs | {"input_ids": input_ids}
        return {"mlm + nsp": self.model(**inputs, labels=labels, next_sentence_label=reviews.nsp_labels).loss}


class UnpaddedPretrain(PaddedPretrain):
    """BertForPreTraining on one row of samples back to back."""

    attention = VARLEN

    def layout(self, batch: PretrainBatch) -> HfReviews:
        return batch.row

    def of_masked(self, batch: PretrainBatch, input_ids: Tensor, labels: Tensor) -> Losses:
        model = self.model
        states = model.bert(**batch.row.inputs | {"input_ids": input_ids}).last_hidden_state[0]
        pooled = model.bert.pooler(states[batch.cls_rows][:, None])
        words, order = model.cls(states, pooled)
        return {"mlm + nsp": F.cross_entropy(words, labels[0]) + F.cross_entropy(order, batch.row.nsp_labels)}


class PackedFinetune(Contender):
    """mtfast's fine-tuning step, as mtfast/training/stages/finetune.py has it."""

    def __init__(self, source: MultiTaskModel) -> None:
        super().__init__(copy.deepcopy(source))

    def losses(self, batch: FinetuneBatch) -> Losses:
        packed = batch.packed
        outputs = self.model(**packed.encoder_inputs(), sequences=packed.sequences)
        return task_losses(TASKS, outputs, packed.tasks)


class PaddedFinetune(Contender):
    """BertModel on a padded batch of each task; compiled are the encoder, once for all, and the heads."""

    attention = "sdpa"

    def __init__(self, source: MultiTaskModel, compiled: bool = False) -> None:
        bert = twin_of(partial(BertModel, add_pooling_layer=False), source, self.attention)
        super().__init__(EagerTwin(bert, source.heads, DROPOUT_P).to(bert.device))
        self.of_cls = self.model.losses
        self.compiled = compiled
        if compiled:
            self.model.bert.compile(dynamic=True)
            self.of_cls = torch.compile(self.model.losses, dynamic=True)

    def losses(self, batch: FinetuneBatch) -> Losses:
        return self.of_cls(self.encode(batch), {task: part.labels for task, part in batch.padded.items()})

    def encode(self, batch: FinetuneBatch) -> dict[str, Tensor]:
        """[CLS] states of each task's sequences."""
        return {task: self.model.encode(part) for task, part in batch.padded.items()}


class UnpaddedFinetune(PaddedFinetune):
    """BertModel on one row of sequences back to back."""

    attention = VARLEN

    def encode(self, batch: FinetuneBatch) -> dict[str, Tensor]:
        states = self.model.bert(**batch.row).last_hidden_state[0]
        return {task: states[rows] for task, rows in batch.cls_rows.items()}


class CachedHeads(Contender):
    """Heads on cached features: float32 weights that compute under autocast, as in
    mtfast/training/stages/heads.py."""

    learning_rate = 1e-3

    def __init__(self, model: nn.Module, features: CachedFeatures, captured: bool = False) -> None:
        super().__init__(model.to(features.cls.device))
        self.features, self.captured = features, captured

    def cast(self, dtype: torch.dtype) -> None:
        self.cls = self.features.cls.to(dtype)

    def autocast(self) -> torch.autocast:
        """In bf16, what the heads compute under."""
        return torch.autocast(self.cls.device.type, torch.bfloat16, enabled=self.cls.dtype == torch.bfloat16)

    def training(self) -> Step:
        self.cast(torch.bfloat16)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.learning_rate,
            weight_decay=0.01,
            fused=True,
            capturable=self.cls.is_cuda,
        )
        return StepGraphs(self.step, CudaRecorder()) if self.captured else self.step

    def step(self, batch: HeadsBatch) -> Tensor:
        loss = super().step(batch)
        self.optimizer.zero_grad()
        return loss


class PackedHeads(CachedHeads):
    """mtfast's heads."""

    def __init__(self, source: MultiTaskHeads, features: CachedFeatures, captured: bool = False) -> None:
        super().__init__(copy.deepcopy(source), features, captured)

    def losses(self, batch: HeadsBatch) -> Losses:
        table = self.features
        sequences = {task: table.rows(task, examples) for task, examples in batch.items()}
        with self.autocast():
            outputs = self.model(self.cls, sequences)
        rows = {
            task: TaskRows(sequences[task], table.labels[task][examples], batch.weights[task])
            for task, examples in batch.items()
        }
        return task_losses(TASKS, outputs, rows)


class TwinHeads(CachedHeads):
    """The eager twin's heads; compiled is all from the examples' numbers to the losses."""

    def __init__(
        self,
        source: MultiTaskHeads,
        features: CachedFeatures,
        captured: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(EagerHeads(features.cls.size(1), source, DROPOUT_P), features, captured)
        self.of_examples = torch.compile(self._of_examples) if compiled else self._of_examples
        self.compiled = compiled

    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        return self.of_examples(batch)

    def _of_examples(self, batch: Mapping[str, Tensor]) -> Losses:
        table = self.features
        cls = {
            task: self.cls[first_then_second(table.rows(task, examples))] for task, examples in batch.items()
        }
        with self.autocast():
            return self.model.losses(
                cls, {task: table.labels[task][examples] for task, examples in batch.items()}
            )


def twin_of(
    build: Callable[[BertConfig], Any], source: PretrainModel | MultiTaskModel, attention: str
) -> Any:
    """Hugging Face's model with this attention, and with the source's weights, where they are."""
    config = copy.deepcopy(source.encoder.config)  # a model keeps its config, and notes its attention there
    with source.encoder.embeddings.word.device:
        twin = build(config)
    twin.load_state_dict(hf_state_dict(source.state_dict()), strict=False)  # lacks what is tied
    twin.set_attn_implementation(attention)
    return twin


@dataclass(frozen=True)
class Stage:
    """What a stage trains on and who takes part.

    examples: of the recipe's step. batch: makes the batch of so many examples with a seed, on a device.
    contenders: how to make each, mtfast first and what is compiled last.
    """

    examples: int
    batch: Callable[[int, int, torch.device], Any]
    contenders: Callable[[torch.device], dict[str, Callable[[], Contender]]]


def stages_of(layers: int, hidden: int, heads: int) -> dict[str, Stage]:
    """The stages of a BERT of this size."""
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=DROPOUT_P,
        attention_probs_dropout_prob=DROPOUT_P,
    )
    mlp = MlpConfig(width=hidden)
    pretrain = (partial(build_pretrain_model, config), PackedPretrain, PaddedPretrain, UnpaddedPretrain)
    finetune = (
        partial(build_multitask_model, config, TASKS, mlp, DROPOUT_P),
        PackedFinetune,
        PaddedFinetune,
        UnpaddedFinetune,
    )
    return {
        "pretrain": Stage(16, pretrain_batch, partial(encoder_contenders, *pretrain)),
        "heads": Stage(2048, heads_batch, partial(heads_contenders, hidden, mlp)),
        "finetune": Stage(160, finetune_batch, partial(encoder_contenders, *finetune)),
    }


def encoder_contenders(
    build: Callable[[], Any],
    packed: Callable[..., Contender],
    padded: Callable[..., Contender],
    unpadded: Callable[..., Contender],
    device: torch.device,
) -> dict[str, Callable[[], Contender]]:
    """The whole model, as each kind of contender takes it."""
    with device:
        source = build()
    return {
        "mtfast": partial(packed, source),
        "eager": partial(padded, source),
        "unpadded": partial(unpadded, source),
        "compile": partial(padded, source, compiled=True),
    }


def heads_contenders(hidden: int, mlp: MlpConfig, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """The heads on one table of features; on CUDA each takes part as a graph too."""
    source = MultiTaskHeads(hidden, TASKS, mlp, DROPOUT_P)
    features = cached_features(hidden, device)
    makers: dict[str, Callable[..., Contender]] = {
        "mtfast": partial(PackedHeads, source, features),
        "eager": partial(TwinHeads, source, features),
        "compile": partial(TwinHeads, source, features, compiled=True),
    }
    found: dict[str, Callable[[], Contender]] = {}
    for name, make in makers.items():
        found[name] = make
        if device.type == "cuda":
            found[graph_of(name)] = partial(make, captured=True)
    return found
