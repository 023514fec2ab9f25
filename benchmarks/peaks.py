"""What the machine can do at most: copying and bf16 matrix products, beside its versions.

    python -m benchmarks peaks [--device cpu] [--mib 1024] [--size 8192] [--results DIR]

Random data: a matrix product of zeros runs faster. What is measured elsewhere is held against these.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.common import (
    RESULTS,
    Row,
    default_device,
    environment,
    print_rows,
    rows_of,
    write_results,
)
from benchmarks.timing import measure

PACKAGES = ("triton", "transformers", "numpy", "pytest", "pytest-xdist", "deepspeed", "datasets")


def main(argv: list[str]) -> None:
    """Print the versions, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--mib", type=int, default=1024, help="size of the tensor that is copied")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    options = parser.parse_args(argv)
    for name, value in (environment(options.device) | versions()).items():
        print(f"{name:14}{value}")
    rows = measured(options.device, options.mib, options.size)
    print_rows(rows)
    print(f"written to {write_results(rows, options.device, options.results)}")


def versions() -> dict[str, str]:
    """Packages that other measurements need or compare with."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measured(device: torch.device, mib: int, size: int) -> Sequence[Row]:
    """A row for copying, in bytes read plus bytes written a second, and one for a bf16 matrix product."""
    source = torch.randn(mib * 2**18, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    timings = measure(
        {"copy": [lambda: target.copy_(source)], "matmul": [lambda: a @ b]},
        device,
        budget_s=1.0,
        most_runs=50,
    )
    copied = {"copy": timings["copy"]}
    rate = 2 * source.nbytes / timings["copy"].median / 1e9
    rows = rows_of("peaks", f"copy {mib} MiB", copied, "copy", gb_per_s=rate)
    product = {"matmul": timings["matmul"]}
    flops = 2 * size**3 / timings["matmul"].median / 1e12
    return rows + rows_of("peaks", f"{size} x {size} bfloat16", product, "matmul", tflop_per_s=flops)
