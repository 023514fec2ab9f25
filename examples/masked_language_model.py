"""Masked language modelling with Hugging Face's Trainer, masked by mtfast and with packed attention.

    python examples/masked_language_model.py [--checkpoint NAME_OR_DIRECTORY] [--data FILE.parquet]

Needs torch, transformers, datasets and accelerate. The defaults are what `make demo` leaves.
"""

import argparse
import tempfile

import torch
from datasets import load_dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

from mtfast.data.collator import FusedMaskingCollator
from mtfast.hf import register_attention


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo/pretrain/last", help="a BERT")
    parser.add_argument("--data", default="runs/demo-corpus/imdb/train.parquet", help="with a column `text`")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    register_attention()
    model = AutoModelForMaskedLM.from_pretrained(options.checkpoint, attn_implementation="mtfast")
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    longest = model.config.max_position_embeddings
    rows = load_dataset("parquet", data_files=options.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=longest),
        remove_columns=rows.column_names,
    )
    split = rows.train_test_split(test_size=0.1, seed=0)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                directory,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                learning_rate=5e-4,
                save_strategy="no",
                report_to="none",
                logging_steps=20,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=split["train"],
            eval_dataset=split["test"],
            # In place of DataCollatorForLanguageModeling, with its arguments.
            data_collator=FusedMaskingCollator(tokenizer, mlm_probability=0.15, seed=1),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"loss on texts not trained on: {before:.3f} before, {after:.3f} after {options.steps} steps")


if __name__ == "__main__":
    main()
