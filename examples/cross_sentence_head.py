"""ConcatMLP as a cross-sentence head: is a question a duplicate of another?

    python examples/cross_sentence_head.py [--checkpoint NAME_OR_DIRECTORY] [--data DIRECTORY]

Both questions of a pair go through the encoder in one batch. The head is an MLP on [u; v], the two [CLS]
states side by side; `ConcatMLP` takes them apart, as they lie, and never writes [u; v].

Needs torch, transformers and datasets. The defaults are what `make demo` leaves.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from mtfast.hf import register_attention
from mtfast.ops import ConcatMLP


class Duplicates(nn.Module):
    """A logit for each pair of questions."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(checkpoint, attn_implementation="mtfast")
        self.head = ConcatMLP(self.encoder.config.hidden_size, 128, 1, activation="relu", dropout_p=0.1)

    def forward(self, first_and_second: dict[str, Tensor]) -> Tensor:
        u, v = self.encoder(**first_and_second).last_hidden_state[:, 0].chunk(2)
        return self.head(u, v).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo/finetune/best-mean", help="a BERT encoder")
    parser.add_argument("--data", default="runs/demo-corpus", help="with quora-train.csv and quora-dev.csv")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    register_attention()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Duplicates(options.checkpoint).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)

    def batches(split: str, size: int, shuffle: bool) -> DataLoader:
        def collate(rows: list[dict]) -> tuple[dict[str, Tensor], Tensor]:
            texts = [row[name] for name in ("sentence1", "sentence2") for row in rows]
            labels = torch.tensor([float(row["is_duplicate"]) for row in rows])
            encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
            return encoded.to(device), labels.to(device)

        return DataLoader(questions(options.data, split), size, shuffle=shuffle, collate_fn=collate)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    step = 0
    while step < options.steps:
        for batch, labels in batches("train", 32, shuffle=True):
            loss = binary_cross_entropy_with_logits(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
            if step == options.steps:
                break
    model.eval()
    with torch.no_grad():
        right = [(model(batch) > 0) == (labels > 0.5) for batch, labels in batches("dev", 64, shuffle=False)]
    print(f"accuracy on dev: {torch.cat(right).float().mean():.3f}")


def questions(directory: str, split: str) -> Dataset:
    """sentence1, sentence2 and is_duplicate, 0 or 1."""
    file = f"{directory}/quora-{split}.csv"
    return load_dataset("csv", data_files=file, delimiter="\t", split="train")


if __name__ == "__main__":
    main()
