"""What every benchmark of an op shares: timing side by side, the machine's description, the results file."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "benchmark", "case", "variant", "median_us", "p20_us", "p80_us", "runs", "ratio_to_baseline",
    "gb_per_s", "copy_gb_per_s", "tflop_per_s",
    "device", "driver", "threads", "torch", "cuda", "python", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile over the runs."""

    median: float
    p20: float
    p80: float
    runs: int


def measure(
    variants: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    most_runs: int = 200,
) -> dict[str, Timing]:
    """Time the variants, taking turns, so that a slow moment of the machine meets all of them.

    Each gets one warm-up call and `budget_s` seconds in all; at least five runs. A run repeats short calls
    until it takes about a millisecond. Check results before: this looks at none. On CUDA the time is that
    between events on the stream, the launches included when they are what is slow.
    """
    repeats: dict[str, int] = {}
    longest = 0.0
    for name, call in variants.items():
        call()
        single = min(_seconds(call, 1, device) for _ in range(2))
        repeats[name] = max(1, min(1000, int(1e-3 / max(single, 1e-7))))
        longest = max(longest, single * repeats[name])
    runs = max(5, min(most_runs, int(budget_s / longest)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, call in variants.items():
            seconds[name].append(_seconds(call, repeats[name], device))
    return {name: summary(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def summary(values: list[float]) -> Timing:
    """Median and percentiles of measured seconds."""
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return Timing(statistics.median(ordered), at[0], at[1], len(ordered))


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def copy_bandwidth(device: torch.device, bytes_each_way: int = 2**28) -> float:
    """Bytes read plus bytes written a second when a large tensor is copied."""
    source = torch.ones(bytes_each_way // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device, budget_s=1.0, most_runs=20)["copy"]
    return 2 * bytes_each_way / timing.median


def environment(device: torch.device) -> dict[str, str]:
    """The device, the versions and the commit, as columns of the results file."""
    commit = _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    driver = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    else:
        name = cpu_name()
    return {
        "device": name,
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def rows_of(
    benchmark: str, case: str, timings: dict[str, Timing], baseline: str, **columns: dict[str, float] | float
) -> list[dict[str, Any]]:
    """One row a variant. A column is a number, or numbers by variant, such as gb_per_s={"mtfast": 3.1}."""
    rows = []
    for variant, timing in timings.items():
        row: dict[str, Any] = {
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
            number = value.get(variant) if isinstance(value, dict) else value
            row[column] = "" if number is None else round(number, 2)
        rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table."""
    for row in rows:
        rate = f"{row['gb_per_s']:9} GB/s" if row.get("gb_per_s") else ""
        rate += f"{row['tflop_per_s']:9} TFLOP/s" if row.get("tflop_per_s") else ""
        print(
            f"{row['benchmark']:18} {row['case']:34} {row['variant']:12} {row['median_us']:12.2f} us "
            f"[{row['p20_us']:.2f}, {row['p80_us']:.2f}] {row['ratio_to_baseline']:8.2f} x {rate}",
            flush=True,
        )


def write_results(rows: Sequence[dict[str, Any]], device: torch.device, directory: Path = RESULTS) -> Path:
    """Put the rows into `<device>-<date>.csv`, in place of earlier rows of the same benchmarks; its path."""
    machine = environment(device)
    stem = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = directory / f"{stem}-{machine['date']}.csv"
    new = {row["benchmark"] for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["benchmark"] not in new]
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**row, **machine} for row in rows)])
    return path


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
