"""sentence-transformers' trainer on packed attention: sentence vectors whose cosine is a similarity.

    python examples/sentence_transformers_training.py [--checkpoint NAME_OR_DIRECTORY] [--data DIRECTORY]

Needs torch, sentence-transformers, datasets and accelerate. The defaults are what `make demo` leaves.
"""

import argparse
import tempfile

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from mtfast.hf import register_attention


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo/pretrain/last", help="a BERT encoder")
    parser.add_argument("--data", default="runs/demo-corpus", help="with sts-train.csv and sts-dev.csv")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    register_attention()
    model = SentenceTransformer(options.checkpoint, model_kwargs={"attn_implementation": "mtfast"})
    dev = pairs(options.data, "dev")
    evaluator = EmbeddingSimilarityEvaluator(dev["sentence1"], dev["sentence2"], dev["score"], name="dev")
    before = evaluator(model)[evaluator.primary_metric]
    with tempfile.TemporaryDirectory() as directory:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                directory,
                max_steps=options.steps,
                per_device_train_batch_size=32,
                learning_rate=1e-4,
                save_strategy="no",
                report_to="none",
                logging_steps=20,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=pairs(options.data, "train"),
            loss=CosineSimilarityLoss(model),
        ).train()
    after = evaluator(model)[evaluator.primary_metric]
    print(f"Spearman correlation on dev: {before:.3f} before, {after:.3f} after {options.steps} steps")


def pairs(directory: str, split: str) -> Dataset:
    """sentence1, sentence2 and, between 0 and 1, score."""
    file = f"{directory}/sts-{split}.csv"
    rows = load_dataset("csv", data_files=file, delimiter="\t", split="train")
    rows = rows.map(lambda row: {"score": row["similarity"] / 5})
    return rows.select_columns(["sentence1", "sentence2", "score"])


if __name__ == "__main__":
    main()
