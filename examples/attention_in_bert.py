"""A Hugging Face BERT with packed attention: the same results, padded and without padding.

    python examples/attention_in_bert.py [--checkpoint NAME_OR_DIRECTORY] [--data FILE.csv]

Needs torch, transformers and datasets. The defaults are what `make demo` leaves.
"""

import argparse
import time

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, DataCollatorWithFlattening

from mtfast.hf import register_attention


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo/finetune/best-mean", help="a BERT encoder")
    parser.add_argument("--data", default="runs/demo-corpus/ids-sst-train.csv", help="tab-separated texts")
    parser.add_argument("--column", default="sentence")
    parser.add_argument("--sentences", type=int, default=64)
    options = parser.parse_args()

    register_attention()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sdpa, packed = (
        AutoModel.from_pretrained(options.checkpoint, attn_implementation=name).to(device).eval()
        for name in ("sdpa", "mtfast")
    )
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    texts = load_dataset("csv", data_files=options.data, delimiter="\t", split="train")[options.column]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts[: options.sentences]]

    # As usual: every sentence is as long as the longest, and attention_mask says what is padding.
    padded = tokenizer.pad(rows, return_tensors="pt").to(device)
    # Back to back, [1, total]: position_ids, and cu_seq_lens_q and max_length_q for the attention.
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    flat = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in flat.items() if name != "labels"
    }

    tokens = padded["attention_mask"].bool()
    everything = torch.ones_like(flat["input_ids"], dtype=torch.bool)
    print(f"{len(rows)} sentences, {int(tokens.sum())} tokens, {tokens.numel()} with padding")
    wanted, usual = step(sdpa, padded, tokens)
    print(f"sdpa, padded             {usual * 1e3:7.1f} ms")
    for name, batch, inside in (("padded", padded, tokens), ("without padding", flat, everything)):
        found, seconds = step(packed, batch, inside)
        differences = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
        print(
            f"{'mtfast, ' + name:25}{seconds * 1e3:7.1f} ms; largest difference of the states "
            f"{differences[0]:.1e}, of a gradient {max(differences[1:]):.1e}"
        )


def step(model: torch.nn.Module, batch: dict[str, Tensor], inside: Tensor) -> tuple[list[Tensor], float]:
    """The tokens' states and all gradients, and the seconds of a forward and backward pass."""
    for _ in range(3):  # the last one is timed
        model.zero_grad()
        begun = time.perf_counter()
        states = model(**batch).last_hidden_state[inside]
        states.square().mean().backward()
        if states.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    gradients = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    return [states.detach(), *gradients], seconds


if __name__ == "__main__":
    main()
