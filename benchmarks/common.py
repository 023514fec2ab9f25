"""What the benchmarks share: timing side by side, memory, the machine's description, the results file."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mtfast.machine import cpu_name

SOURCES = Path(__file__).parents[1]
RESULTS = SOURCES / "benchmarks" / "results"
COLUMNS = (
    "benchmark", "case", "variant", "median_us", "p20_us", "p80_us", "runs", "ratio_to_baseline",
    "gb_per_s", "copy_gb_per_s", "share_of_copy", "tflop_per_s", "peak_mib",
    "device", "driver", "threads", "torch", "cuda", "python", "commit", "date",
)  # fmt: skip
Call = Callable[[], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile over the runs."""

    median: float
    p20: float
    p80: float
    runs: int


def measure(
    variants: Mapping[str, Call],
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


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
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


def peak_mib(call: Call, device: torch.device) -> float:
    """MiB of tensors alive at most during the call beyond those it began with, its result included."""
    call()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    alive = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most / 2**20


@functools.cache
def say_once(text: str) -> None:
    """Print what holds for many cases."""
    print(text, flush=True)


def running(calls: Mapping[str, Call]) -> dict[str, Call]:
    """The calls that run; why another one is left out is told."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except Exception as error:
            say_once(f"left out: {name}: {reason_of(error)}")
    return found


def graphs(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Each call as a replay of a CUDA graph of it, called "NAME, graph"; why one is left out is told."""
    found = {}
    for name, call in calls.items():
        try:
            found[f"{name}, graph"] = _graphed(call)
        except Exception as error:
            say_once(f"left out: {name}, graph: {reason_of(error)}")
    return found


def reason_of(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _graphed(call: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
    driver = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    else:
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


def commit() -> str:
    """git's name of the sources, "-dirty" when they differ from it; results files are no sources.

    Where the sources are a copy without a repository it is what MTFAST_COMMIT says.
    """
    name = git("describe", "--always")
    if not name:
        return os.environ.get("MTFAST_COMMIT", "unknown")
    return f"{name}-dirty" if changes() else name


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
    **columns: Mapping[str, float] | float,
) -> list[Row]:
    """One row a variant. A column is a number, or numbers by variant, such as gb_per_s={"mtfast": 3.1}."""
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
            number = value.get(variant) if isinstance(value, Mapping) else value
            if number is not None:
                row[column] = float(f"{number:.4g}")
        if "gb_per_s" in row and "copy_gb_per_s" in row:
            row["share_of_copy"] = round(row["gb_per_s"] / row["copy_gb_per_s"], 3)
        rows.append(row)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as a table."""
    units = (
        ("gb_per_s", "GB/s"),
        ("share_of_copy", "of copying"),
        ("tflop_per_s", "TFLOP/s"),
        ("peak_mib", "MiB"),
    )
    for row in rows:
        rates = "".join(f"{row[column]:10} {unit}" for column, unit in units if column in row)
        print(
            f"{row['benchmark']:16} {row['case']:42} {row['variant']:30} {row['median_us']:12.2f} us "
            f"[{row['p20_us']:.2f}, {row['p80_us']:.2f}] {row['ratio_to_baseline']:8.2f} x{rates}",
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


@dataclass(frozen=True)
class Case:
    """One line of comparison: `measure` checks and times its variants and returns their rows."""

    name: str
    measure: Callable[[], list[Row]]


class WrongResultError(RuntimeError):
    """What was to be measured does not compute what it should."""


def op_parser(name: str, module_doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that the benchmarks of ops share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, help="end within so many, with the cases done by then")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    return parser


def run_cases(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Measure the cases in their order; write and print each one's rows before the next. The exit status.

    A case that fails is told and does not take the others with it. When another one as long as the longest so
    far would not end within `options.seconds`, those that are left are told and left out: no failure.
    """
    started = begun = time.monotonic()
    longest = 0.0
    failed, path = [], None
    for index, case in enumerate(cases):
        now = time.monotonic()
        longest, begun = max(longest, now - begun), now
        if options.seconds is not None and now - started + longest > options.seconds:
            print(f"out of time: {len(cases) - index} of {len(cases)} cases left out, from {case.name!r} on")
            break
        try:
            rows = case.measure()
            path = write_results(rows, options.device, options.results)
            print_rows(rows)
        except Exception:
            failed.append(case.name)
            print(f"case {case.name!r} failed:\n{traceback.format_exc()}", flush=True)
            if not _alive(options.device):
                print("the GPU does not answer any more: the other cases are left out")
                break
    if path:
        print(f"written to {path}")
    print(f"failed: {', '.join(failed)}" if failed else "no case failed", flush=True)
    return 1 if failed else 0


def _alive(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
