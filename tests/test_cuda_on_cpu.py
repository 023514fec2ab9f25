"""The emulation itself: right results from a right kernel, and every planted fault caught."""

import pytest
import torch
from cuda_on_cpu.harness import CASES, HERE, Case, KernelError, load, run_sanitized

SOURCE = HERE / "planted_faults.cu"
TILES, TILE, BLOCKS = 3, 256, 2
FAULTS = (
    "none",
    "no wait",
    "no barrier before a read",
    "no barrier before a refill",
    "shared write out of bounds",
    "divergent barrier",
    "global race",
    "shuffle without all lanes",
    "shuffle on two branches",
    "copy from shared memory",
    "global store to shared memory",
)


def sum_tiles(kernels, fault: str = "none") -> None:
    data = torch.arange(TILES * TILE, dtype=torch.float32)
    output = torch.zeros(BLOCKS)
    kernels.sum_tiles_launch(data, output, TILES, BLOCKS, FAULTS.index(fault), None)
    assert output.tolist() == [data.sum().item()] * BLOCKS, f"wrong sums {output.tolist()}"


def write_out_of_bounds(kernels) -> None:
    sum_tiles(kernels, "shared write out of bounds")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_kernel_passes(case):
    sum_tiles(load(SOURCE, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_instructions(case, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    c = torch.full((16, 8), torch.nan)
    load(SOURCE, case).one_mma_launch(a, b, c, int(dtype == torch.float16), None)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


RACES = Case(races=True)


@pytest.mark.parametrize(
    ("fault", "case", "seen"),
    [
        ("no barrier before a read", RACES, "race: read after a write at shared memory"),
        (
            "no barrier before a refill",
            RACES,
            "race: (write after a read|read after a write) at shared memory",
        ),
        ("global race", RACES, "race: write after a write at global memory"),
        ("divergent barrier", Case(), "divergent barrier"),
        (
            "shuffle without all lanes",
            Case(),
            "lane 16, which has exited|thread 0 waits in a warp collective",
        ),
        ("shuffle on two branches", Case(), "divergent warp collective .* came there on two branches"),
        ("copy from shared memory", Case(), "cp.async: the source is in shared memory"),
        ("global store to shared memory", Case(), "st.global: the address is in shared memory"),
    ],
)
def test_fault_is_caught(fault, case, seen):
    kernels = load(SOURCE, case)
    with pytest.raises(KernelError, match=seen):
        sum_tiles(kernels, fault)


def test_missing_wait_gives_wrong_sums_when_copies_land_late():
    with pytest.raises(AssertionError, match="wrong sums"):
        sum_tiles(load(SOURCE), "no wait")


@pytest.mark.sweep
def test_shared_write_out_of_bounds_is_caught(full_sweep):
    if not full_sweep:
        pytest.skip("takes as long to compile as the rest: for MTFAST_TEST_SWEEP=full")
    with pytest.raises(KernelError, match=r"AddressSanitizer.*use-after-poison[\s\S]*planted_faults\.cu"):
        run_sanitized("test_cuda_on_cpu:write_out_of_bounds", SOURCE)
