"""What the tests of the model share: a small BERT, packed batches, Hugging Face's view of them, and tasks."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig

from mtfast.data.demo import DemoCorpus, write_demo_corpus
from mtfast.models.checkpoint import hf_state_dict
from mtfast.recipes import PAPER_TASKS
from mtfast.tasks import Task


def small_config(**changes) -> BertConfig:
    fields = dict(
        vocab_size=211,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertConfig(**(fields | changes))


def paper_tasks(head: str = "linear", pair_input: str = "separate") -> dict[str, Task]:
    """The paper's tasks with this head for sentences and this input for pairs."""
    return {
        name: replace(task, pair_input=pair_input) if task.has_mlp else replace(task, head=head)
        for name, task in PAPER_TASKS.items()
    }


def short_corpus(directory: Path, rows: int) -> DemoCorpus:
    """The demo corpus with so many rows of each task and split."""
    corpus = write_demo_corpus(directory)
    for file in corpus.tasks.glob("*.csv"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: 1 + rows]), encoding="utf-8")
    return corpus


def small_corpus(directory: Path, rows: int) -> DemoCorpus:
    """`short_corpus` with a smaller BERT."""
    corpus = short_corpus(directory, rows)
    config = corpus.bert / "config.json"
    smaller = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    config.write_text(json.dumps(json.loads(config.read_text()) | smaller))
    return corpus


def pack(sentences: list[list[int]], first_segments: list[int] | None = None) -> dict:
    """Encoder inputs of token lists; the first first_segments[i] tokens of sentence i are of type 0."""
    lengths = [len(s) for s in sentences]
    firsts = lengths if first_segments is None else first_segments
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    places = torch.cat([torch.arange(n) for n in lengths])
    types = torch.cat([(torch.arange(n) >= f) for n, f in zip(lengths, firsts, strict=True)])
    return dict(
        input_ids=torch.tensor([t for s in sentences for t in s], dtype=torch.int32),
        token_type_ids=types.int(),
        position_ids=places.int(),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    )


def pad(packed: dict) -> tuple[dict[str, Tensor], Tensor]:
    """Hugging Face's padded inputs of a packed batch, and which padded places hold its tokens."""
    bounds = packed["cu_seqlens"].long()
    inside = torch.arange(packed["max_seqlen"]) < bounds.diff()[:, None]
    inputs = {}
    for name in ("input_ids", "token_type_ids"):
        inputs[name] = torch.zeros(inside.shape, dtype=torch.int64)
        inputs[name][inside] = packed[name].long()
    return inputs | {"attention_mask": inside.long()}, inside


def random_sentences(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def load_twin(twin: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give a Hugging Face model the weights of ours."""
    missing, unexpected = twin.load_state_dict(hf_state_dict(model.state_dict()), strict=False)
    assert not unexpected
    # Tied to what was loaded, or the pooler that a model without pre-training heads does not have.
    assert all("decoder" in name or "pooler" in name for name in missing), missing


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
