"""FusedMaskingCollator in the place of DataCollatorForLanguageModeling."""

import pytest
import torch
from small_tokenizer import small_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from mtfast.data.collator import FusedMaskingCollator

SENTENCES = ["a good film", "the film was not bad, it was playing well", "?"] * 40


def examples(**options) -> list[dict]:
    tokenizer = small_tokenizer()
    return [dict(tokenizer(sentence, **options)) for sentence in SENTENCES]


def test_batches_are_those_of_hugging_face_but_for_what_is_masked():
    tokenizer = small_tokenizer()
    ours = FusedMaskingCollator(tokenizer, pad_to_multiple_of=8)(examples())
    theirs = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=8)(examples())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    original = torch.where(ours["labels"] == -100, ours["input_ids"], ours["labels"])
    assert torch.equal(original, torch.where(theirs["labels"] == -100, theirs["input_ids"], theirs["labels"]))
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    chosen = ours["labels"] != -100
    assert not (chosen & special).any()
    count, n = int(chosen.sum()), int((~special).sum())
    assert abs(count - 0.15 * n) <= 4 * (n * 0.15 * 0.85) ** 0.5


def test_special_tokens_mask_is_respected():
    batch = examples(return_special_tokens_mask=True)
    for example in batch:
        example["special_tokens_mask"][1] = 1  # the first word, too
    collator = FusedMaskingCollator(small_tokenizer(), mlm_probability=1.0)
    masked = collator(batch)
    assert "special_tokens_mask" not in masked
    assert bool((masked["labels"][:, 1] == -100).all())
    first = torch.tensor([example["input_ids"][1] for example in batch])
    assert torch.equal(masked["input_ids"][:, 1], first)
    assert bool((masked["labels"][1, 2:6] != -100).all())


def test_exact_strategy_and_whole_words():
    exact = FusedMaskingCollator(small_tokenizer(), strategy="exact")(examples())
    assert bool(((exact["labels"] != -100).sum(1) >= 1).all())
    tokenizer = small_tokenizer()
    collator = FusedMaskingCollator(tokenizer, whole_word_mask=True, mlm_probability=0.5)
    assert collator.mask_replace_prob == 0.8 and collator.random_replace_prob == 0.1
    masked = collator(examples())
    pieces = {index for piece, index in tokenizer.get_vocab().items() if piece.startswith("##")}
    original = torch.where(masked["labels"] == -100, masked["input_ids"], masked["labels"]).tolist()
    chosen = (masked["labels"] != -100).tolist()
    for row, flags in zip(original, chosen, strict=True):
        assert all(flags[i] == flags[i - 1] for i in range(1, len(row)) if row[i] in pieces)


def test_seed_repeats_a_run_and_changes_from_batch_to_batch():
    def run() -> list[torch.Tensor]:
        collator = FusedMaskingCollator(small_tokenizer(), seed=3)
        return [collator(examples())["labels"] for _ in range(2)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_in_the_workers_of_a_data_loader():
    collator = FusedMaskingCollator(small_tokenizer(), seed=3)
    loader = DataLoader(examples(), batch_size=60, collate_fn=collator, num_workers=2)  # type: ignore[arg-type]
    first, second = (batch["labels"] for batch in loader)
    assert not torch.equal(first, second)


def test_without_mlm_it_says_what_it_wants():
    with pytest.raises(ValueError, match="wants mlm=True"):
        FusedMaskingCollator(small_tokenizer(), mlm=False)
