"""An experiment in numbers: mean and spread of its variants over seeds, and a paired test of what differs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtfast.config import ConfigError
from mtfast.experiments import Experiment
from mtfast.kinds import METRICS
from mtfast.plots import is_number
from mtfast.run_record import RunRecord
from mtfast.tasks import Task

RESAMPLES = 5000
LEVEL = 0.95
Records = Mapping[str, Sequence[RunRecord]]  # the runs of each variant that are there, by seed


def compared(experiment: Experiment, records: Records) -> dict[str, Any]:
    """What an experiment has found, as plain values; it follows from the runs' results alone.

    `splits` has dev, and test where every run has been evaluated on it with all tasks. Of each split
    `variants` have, for every task's metric that counts and for their mean, the `values` by seed, their
    `mean` and their `spread`, which is the sample standard deviation (None for one seed); for dev also those
    of the `last` epoch, which was not chosen on dev. `difference` is the second variant's less the first's,
    over the seeds that both have: its mean, `low` and `high`, between which it lies with 95%, and `p`, all
    by the paired bootstrap over examples (Efron and Tibshirani 1993): examples are drawn anew, the same ones
    for all runs, so that it tells what another sample of examples would; what other seeds would, the spread
    does.

    Args:
        records: of the variants by name.

    Raises:
        ConfigError: runs were evaluated on different examples.
    """
    runs = [run for variant in experiment.variants for run in records.get(variant.name, ())]
    whole = bool(runs) and all(records.get(variant.name) for variant in experiment.variants)
    tested = whole and all(is_number(run.metrics("test").get("mean")) for run in runs)
    tasks: Mapping[str, Task] = runs[0].tasks if runs else {}
    return {
        "title": experiment.title,
        "resamples": RESAMPLES,
        "splits": {
            split: _split(experiment, records, tasks, split)
            for split in (("test", "dev") if tested else ("dev",))
        },
    }


def keys_of(tasks: Mapping[str, Task]) -> list[str]:
    """The metrics that are compared: those that count, and their mean."""
    return [*(f"{name}_{task.main_metric}" for name, task in tasks.items()), "mean"]


def _split(experiment: Experiment, records: Records, tasks: Mapping[str, Task], split: str) -> dict[str, Any]:
    keys, variants = keys_of(tasks), {}
    for variant in experiment.variants:
        runs = [run for run in records.get(variant.name, ()) if run.metrics(split)]
        found: dict[str, Any] = {"seeds": [_seed(run) for run in runs]}
        found["result"] = {key: _over_seeds([run.metrics(split).get(key) for run in runs]) for key in keys}
        if split == "dev":
            last = [_last_metrics(run) for run in runs]
            found["last"] = {key: _over_seeds([metrics.get(key) for metrics in last]) for key in keys}
        variants[variant.name] = found
    first, second = (
        {_seed(run): run for run in records.get(variant.name, ()) if run.metrics(split)}
        for variant in experiment.variants
    )
    shared = [seed for seed in first if seed in second]
    pairs = [(first[seed], second[seed]) for seed in shared]
    return {"variants": variants, "difference": _difference(pairs, tasks, split) if pairs else {}}


def _seed(run: RunRecord) -> int:
    return run.config.seed if run.config else 0


def _last_metrics(run: RunRecord) -> Mapping[str, Any]:
    """Of the last epoch of the stage whose best epoch the results are of."""
    choice = run.choice()
    last = run.last_evaluation(choice.stage) if choice else None
    return last["metrics"] if last else {}


def _over_seeds(values: Sequence[Any]) -> dict[str, Any]:
    if not values or not all(map(is_number, values)):
        return {"values": [], "mean": None, "spread": None}
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "spread": spread}


def _difference(
    pairs: Sequence[tuple[RunRecord, RunRecord]], tasks: Mapping[str, Task], split: str
) -> dict[str, dict[str, Any]]:
    """By metric, the mean difference; where all runs have their outcomes, what the bootstrap says of it."""
    differences = {
        key: statistics.fmean(b.metrics(split)[key] - a.metrics(split)[key] for a, b in pairs)
        for key in keys_of(tasks)
        if all(is_number(run.metrics(split).get(key)) for pair in pairs for run in pair)
    }
    drawn = _resampled(pairs, tasks, split)
    return {
        key: {"mean": value, **(_interval(drawn[key]) if key in drawn else {})}
        for key, value in differences.items()
    }


def _resampled(
    pairs: Sequence[tuple[RunRecord, RunRecord]], tasks: Mapping[str, Task], split: str
) -> dict[str, np.ndarray]:
    """The difference of every metric [RESAMPLES], each time on other examples."""
    outcomes = [[run.outcomes(split) for run in pair] for pair in pairs]
    if not all(name in of_run for pair in outcomes for of_run in pair for name in tasks):
        return {}
    random = np.random.default_rng(0)
    drawn = {}
    for name, task in tasks.items():
        labels = outcomes[0][0][name].labels
        if not all(np.array_equal(of_run[name].labels, labels) for pair in outcomes for of_run in pair):
            raise ConfigError(
                f"the runs in {', '.join(str(run.directory) for pair in pairs for run in pair)} were not "
                f"evaluated on the same {split} examples of {name}; evaluate them again"
            )
        metric = METRICS[task.main_metric]
        found = np.empty(RESAMPLES)
        for index in range(RESAMPLES):
            rows = random.integers(len(labels), size=len(labels))
            a, b = (
                [metric(pair[side][name].predictions[rows], labels[rows]) for pair in outcomes]
                for side in (0, 1)
            )
            found[index] = np.mean(b) - np.mean(a)
        drawn[f"{name}_{task.main_metric}"] = found
    return drawn | {"mean": np.mean(list(drawn.values()), axis=0)}


def _interval(drawn: np.ndarray) -> dict[str, float]:
    """The percentile interval, and twice the share of the draws on the rarer side of zero."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    rarer = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return {"low": float(low), "high": float(high), "p": min(1.0, 2 * (rarer + 1) / (len(drawn) + 1))}
