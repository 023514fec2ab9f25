"""From tokenized reviews to masked pre-training batches: mtfast against datasets.map and padding.

    python -m benchmarks data_pipeline --data DIR --checkpoint DIR [--reviews 2000] [--max-length 512]
        [--threads 2]

All begin with the reviews' sentences as word pieces and end with one epoch of batches of 16 samples
`[CLS] A [SEP] B [SEP]`, as the model takes them. Of "mtfast", on one thread, these are timed: `build_samples`
without its tokenization (it chooses the pairs and joins them), planning the epoch, `pack_reviews` and
`mask_tokens` of every batch. "mtfast, prefetch" packs in a background thread, as training does, and masks
meanwhile.

"datasets.map" is a `Dataset.map(batched=True)` that joins the pairs and masks them, once for all epochs as
the recipe does, and then padding of every batch. Its results are mtfast's, ids, segments, labels and all,
which is checked before. To be comparable it is told for nothing which pairs there are and which samples each
batch has, finds A and B in columns of their own, and masks with `mask_tokens`. "datasets.map, collator" joins
in the map and leaves masking and padding to Hugging Face's DataCollatorForLanguageModeling, whose masks are
its own. Nothing is written to a disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling

from benchmarks.common import RESULTS, Row, print_rows, rows_of, write_results
from benchmarks.stage_setup import parser_of
from benchmarks.timing import measure
from mtfast.config import PretrainConfig
from mtfast.data import reviews as making
from mtfast.data.packing import ReviewBatch, pack_reviews
from mtfast.data.prefetch import prefetch
from mtfast.data.reviews import ReviewSamples, ReviewTable, build_samples, read_reviews
from mtfast.data.sampler import ReviewStepPlan, plan_reviews
from mtfast.models.checkpoint import load_tokenizer
from mtfast.ops import mask_tokens

SEED = 1
RECIPE = PretrainConfig()
BASELINE = "datasets.map"
MAP_ROWS = 1000  # the default of datasets
CPU = torch.device("cpu")


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    parser = parser_of("data_pipeline", "from tokenized reviews to masked batches")
    parser.add_argument("--reviews", type=int, default=2000, help="so many of the data's (default: 2000)")
    parser.add_argument("--max-length", type=int, default=512, help="of samples, in word pieces")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a variant; at least five runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    source = Path(options.data) / "imdb" if (Path(options.data) / "imdb").is_dir() else Path(options.data)
    table = read_reviews(source, options.reviews)
    rows = compare(table, load_tokenizer(options.checkpoint), options.max_length, options.budget)
    print_rows(rows)
    print(f"written to {write_results(rows, CPU, options.results)}")
    return 0


def compare(table: ReviewTable, tokenizer: Any, max_length: int, budget_s: float) -> list[Row]:
    """Check that all make the same batches, and time them."""
    ours = OurPipeline(table, tokenizer, max_length)
    samples = ours.samples()
    plan = ours.plan(samples)
    theirs = TheirPipeline(samples, plan, tokenizer, ours.masking)
    pipelines: dict[str, Callable[[], Iterator[Any]]] = {
        "mtfast": ours.batches,
        "mtfast, prefetch": partial(ours.batches, ahead=True),
        BASELINE: theirs.batches,
        "datasets.map, collator": theirs.collated,
    }
    check(pipelines)
    timings = measure(
        {name: [partial(exhaust, batches)] for name, batches in pipelines.items()}, CPU, budget_s=budget_s
    )
    rates = {name: len(samples) / timing.median for name, timing in timings.items()}
    case = f"{len(samples)} samples of at most {max_length}, {int(samples.lengths.sum())} tokens"
    return rows_of("data_pipeline", case, timings, BASELINE, examples_per_s=rates)


def exhaust(batches: Callable[[], Iterator[Any]]) -> None:
    """Make every batch."""
    for _ in batches():
        pass


@dataclass(frozen=True)
class Unpacked:
    """A sample of a batch: ids with their masks, token types and labels [tokens], its NSP label."""

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]
    next_sentence_label: int


class OurPipeline:
    """mtfast's."""

    def __init__(self, table: ReviewTable, tokenizer: Any, max_length: int) -> None:
        self.table, self.tokenizer, self.max_length = table, tokenizer, max_length
        self.masking = {
            "special_ids": sorted(tokenizer.all_special_ids),
            "mask_token_id": tokenizer.mask_token_id,
            "vocab_size": len(tokenizer),
            "seed": SEED,
            "mlm_probability": RECIPE.mlm_probability,
        }
        self._tokenized = making._sentences(table.texts, tokenizer, (max_length - 3) // 2)

    def samples(self) -> ReviewSamples:
        """The pairs, from the sentences' word pieces."""
        with mock.patch.object(making, "_sentences", return_value=self._tokenized):
            return build_samples(self.table, self.tokenizer, max_length=self.max_length, seed=SEED)

    def plan(self, samples: ReviewSamples) -> list[ReviewStepPlan]:
        """The first epoch's steps."""
        masked = samples.masked_counts(RECIPE.mlm_probability)
        return plan_reviews(samples.lengths, masked, batch_size=RECIPE.batch_size, seed=SEED, epoch=0)

    def batches(self, ahead: bool = False) -> Iterator[tuple[ReviewBatch, Tensor, Tensor]]:
        """An epoch's packed batches, with masked ids and labels int32 [total].

        ahead: pack in another thread.
        """
        samples = self.samples()
        packed = map(partial(self._pack, samples), self.plan(samples))
        for batch in prefetch(packed) if ahead else packed:
            masked = mask_tokens(
                batch.input_ids, positions=batch.positions, cu_seqlens=batch.cu_seqlens, **self.masking
            )
            yield batch, masked.input_ids, masked.labels

    def _pack(self, samples: ReviewSamples, step: ReviewStepPlan) -> ReviewBatch:
        return pack_reviews(
            samples,
            step.micro_batches[0],
            mlm_probability=RECIPE.mlm_probability,
            mlm_weight=1 / step.step_masked,
            nsp_weight=1 / step.step_samples,
            mask_seed=SEED,
        )


class TheirPipeline:
    """That of datasets, with the pairs and the steps of mtfast."""

    def __init__(
        self, samples: ReviewSamples, plan: Sequence[ReviewStepPlan], tokenizer: Any, masking: dict[str, Any]
    ) -> None:
        sequences = samples.sequences
        self.tokenizer, self.masking, self.most = tokenizer, masking, sequences.max_length
        self.steps = [step.micro_batches[0].tolist() for step in plan]
        runs = [run.tolist() for run in np.split(sequences.tokens, sequences.offsets[1:-1])]
        begins = sequences.segment_b_start.tolist()
        self.pairs = datasets.Dataset.from_dict(
            {
                "a": [run[1 : begin - 1] for run, begin in zip(runs, begins, strict=True)],
                "b": [run[begin:-1] for run, begin in zip(runs, begins, strict=True)],
                "next_sentence_label": samples.nsp_labels,
            }
        )
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RECIPE.mlm_probability)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """An epoch's padded batches, masked in the map."""
        joined = self._map(self._joined_and_masked)
        fillers = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0, "labels": -100}
        for rows in self.steps:
            features = joined[rows]
            batch = {
                name: pad_sequence(list(map(torch.tensor, features[name])), True, filler)
                for name, filler in fillers.items()
            }
            lengths = torch.tensor(list(map(len, features["input_ids"])))
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            batch["next_sentence_label"] = torch.tensor(features["next_sentence_label"])
            yield batch

    def collated(self) -> Iterator[dict[str, Tensor]]:
        """An epoch's padded batches, masked by Hugging Face's collator."""
        joined = self._map(self._joined)
        for rows in self.steps:
            yield self.collator([joined[row] for row in rows])

    def _map(self, function: Callable[..., dict[str, list[Any]]]) -> datasets.Dataset:
        return self.pairs.map(
            function,
            with_indices=True,
            batched=True,
            batch_size=MAP_ROWS,
            remove_columns=["a", "b"],
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint="unused",  # which would be found by pickling the function
        )

    def _joined(self, pairs: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        both = list(zip(pairs["a"], pairs["b"], strict=True))
        return {
            "input_ids": [[cls, *a, sep, *b, sep] for a, b in both],
            "token_type_ids": [[0] * (len(a) + 2) + [1] * (len(b) + 1) for a, b in both],
        }

    def _joined_and_masked(self, pairs: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        joined = self._joined(pairs, indices)
        lengths = np.array(list(map(len, joined["input_ids"])))
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        masked = mask_tokens(
            torch.from_numpy(np.concatenate(joined["input_ids"])),
            positions=torch.from_numpy(np.repeat(np.array(indices) * self.most, lengths) + within),
            cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
            **self.masking,
        )
        input_ids, labels = (np.split(values.numpy(), ends[:-1]) for values in masked)
        return joined | {"input_ids": input_ids, "labels": labels}


def unpacked(batch: Any) -> list[Unpacked]:
    """The samples of a batch, packed or padded."""
    if isinstance(batch, tuple):
        packed, input_ids, labels = batch
        cuts = packed.cu_seqlens.tolist()
        parts = [slice(begin, end) for begin, end in itertools.pairwise(cuts)][: packed.size]
        columns = [(x, part) for part in parts for x in (input_ids, packed.token_type_ids, labels)]
        nsp = packed.nsp_labels
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        names = ("input_ids", "token_type_ids", "labels")
        columns = [(batch[name][row], slice(n)) for row, n in enumerate(lengths) for name in names]
        nsp = batch["next_sentence_label"]
    lists = iter([values[part].tolist() for values, part in columns])
    rows = zip(lists, lists, lists, nsp.tolist(), strict=True)
    return [Unpacked(ids, types, labels, order) for ids, types, labels, order in rows]


def check(pipelines: Mapping[str, Callable[[], Iterator[Any]]]) -> None:
    """SystemExit unless all make the same batches; the collator's may have other words masked."""
    expected = [unpacked(batch) for batch in pipelines["mtfast"]()]
    for name, batches in pipelines.items():
        found = [unpacked(batch) for batch in batches()]
        if name.endswith("collator"):
            right = [[unmasked(sample) for sample in batch] for batch in expected]
            found = [[unmasked(sample) for sample in batch] for batch in found]
        else:
            right = expected
        if found != right:
            raise SystemExit(f"{name} does not make mtfast's batches")


def unmasked(sample: Unpacked) -> Unpacked:
    """The sample as it was before its words were masked."""
    both = zip(sample.input_ids, sample.labels, strict=True)
    ids = [token if label == -100 else label for token, label in both]
    return Unpacked(ids, sample.token_type_ids, [], sample.next_sentence_label)
