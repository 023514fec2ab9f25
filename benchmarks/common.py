"""What the benchmarks share: figures as rows, the machine's description, the results file."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtfast.machine import cpu_name

SOURCES = Path(__file__).parents[1]
RESULTS = SOURCES / "benchmarks" / "results"
DOCS = RESULTS.parents[1] / "docs"
COLUMNS = (
    "benchmark", "case", "variant", "median_us", "p20_us", "p80_us", "runs", "ratio_to_baseline",
    "examples_per_s", "share_of_step", "gb_per_s", "copy_gb_per_s", "share_of_copy", "tflop_per_s",
    "peak_mib", "kernels", "idle_share", "shapes", "filler_share", "wrong",
    "device", "driver", "threads", "torch", "cuda", "python", "commit", "date",
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile over the runs."""

    median: float
    p20: float
    p80: float
    runs: int


def summary(values: list[float]) -> Timing:
    """Median and percentiles of measured seconds."""
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return Timing(statistics.median(ordered), at[0], at[1], len(ordered))


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, str]:
    """The device, the versions and the commit, as columns of the results file."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    else:
        driver = ""
        name = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": name,
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def _driver() -> str:  # nvidia-smi can take a second
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]


def commit() -> str:
    """git's name of the sources, "-dirty" when they differ from it; results files are no sources.

    Where the sources are a copy, whose repository may be absent or of another state, MTFAST_COMMIT says it.
    """
    if said := os.environ.get("MTFAST_COMMIT"):
        return said
    name = git("describe", "--always")
    return f"{name}-dirty" if changes() else name or "unknown"


def changes() -> str:
    """The tracked files, but results, that differ from the commit, as git status lists them."""
    return git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"
    )


def git(*arguments: str) -> str:
    """What git prints of these sources; nothing where they are no repository."""
    return _output(["git", "-C", str(SOURCES), *arguments])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def rows_of(
    benchmark: str,
    case: str,
    timings: Mapping[str, Timing],
    baseline: str,
    **columns: Mapping[str, float] | Mapping[str, str] | float,
) -> list[Row]:
    """One row a variant. A column is a number, or entries by variant, such as gb_per_s={"mtfast": 3.1}.

    The ratio to the baseline is that of examples_per_s, where those are given, else of the median times.
    "wrong" says in a few words what is wrong with the variant's result, nothing where it is right.
    """
    rows = []
    for variant, timing in timings.items():
        row: Row = {
            "benchmark": benchmark,
            "case": case,
            "variant": variant,
            "median_us": round(timing.median * 1e6, 2),
            "p20_us": round(timing.p20 * 1e6, 2),
            "p80_us": round(timing.p80 * 1e6, 2),
            "runs": timing.runs,
            "ratio_to_baseline": round(timings[baseline].median / timing.median, 3),
        }
        for column, value in columns.items():
            entry = value.get(variant) if isinstance(value, Mapping) else value
            if entry is not None:
                row[column] = entry if isinstance(entry, str) else float(f"{entry:.4g}")
        if isinstance(rates := columns.get("examples_per_s"), Mapping):
            row["ratio_to_baseline"] = round(float(rates[variant]) / float(rates[baseline]), 3)
        if "gb_per_s" in row and "copy_gb_per_s" in row:
            row["share_of_copy"] = round(row["gb_per_s"] / row["copy_gb_per_s"], 3)
        rows.append(row)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as a table."""
    units = (
        ("examples_per_s", "examples/s"),
        ("share_of_step", "of the step"),
        ("gb_per_s", "GB/s"),
        ("share_of_copy", "of copying"),
        ("tflop_per_s", "TFLOP/s"),
        ("peak_mib", "MiB"),
        ("kernels", "kernels"),
        ("idle_share", "idle"),
        ("shapes", "shapes"),
        ("filler_share", "filler"),
    )
    for row in rows:
        rates = "".join(f"{row[column]:10} {unit}" for column, unit in units if column in row)
        wrong = f"  WRONG: {row['wrong']}" if row.get("wrong") else ""
        print(
            f"{row['benchmark']:16} {row['case']:42} {row['variant']:30} {row['median_us']:12.2f} us "
            f"[{row['p20_us']:.2f}, {row['p80_us']:.2f}] {row['ratio_to_baseline']:8.2f} x{rates}{wrong}",
            flush=True,
        )


def write_results(rows: Sequence[Row], device: torch.device, directory: Path = RESULTS) -> Path:
    """Put the rows into `<device>-<date>.csv`; its path.

    A row takes the place of an earlier one of the same benchmark, case and variant, so that runs over
    different cases add up.
    """
    path, machine = results_path(device, directory), environment(device)
    new = {_key(row) for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if _key(row) not in new]
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**row, **machine} for row in rows)])
    partial.replace(path)
    return path


def results_path(device: torch.device, directory: Path = RESULTS) -> Path:
    """Today's results file of the machine."""
    machine = environment(device)
    stem = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return directory / f"{stem}-{machine['date']}.csv"


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["benchmark"], row["case"], row["variant"]
