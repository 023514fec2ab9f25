"""The counting of costs: what is counted by hand is what is counted, and waste is seen."""

import pytest
import torch
from cuda_on_cpu.costs import Costs
from cuda_on_cpu.harness import HERE, Case, load

SOURCE = HERE / "planted_costs.cu"
THREADS, WARPS, BLOCKS = 64, 2, 6


def add_sum(waste: int = 0, order: str = "forward") -> Costs:
    kernels = load(SOURCE, Case(costs=True, order=order))
    x, scale = torch.arange(BLOCKS * THREADS).float(), torch.tensor([2.0])
    output = torch.full_like(x, torch.nan)
    kernels.add_sum_launch(x, scale, output, BLOCKS, waste, None)
    rows = 2 * x.view(BLOCKS, THREADS)
    assert torch.equal(output.view(BLOCKS, THREADS), rows + rows.sum(1, keepdim=True))
    return kernels.costs


ONCE = Costs(
    read=BLOCKS * (4 * THREADS + 4 * WARPS),  # the row, and the scale once a warp
    written=BLOCKS * 4 * THREADS,
    shuffles=BLOCKS * WARPS * 5,
    barriers=BLOCKS,
    longest_loop=1,
    blocks=BLOCKS,
)


def total(costs: Costs) -> Costs:
    """Without those of each launch."""
    return Costs(**{name: value for name, value in vars(costs).items() if name != "by_kernel"})


@pytest.mark.parametrize("order", ["forward", "reverse", "random", "warp priority"])
def test_counted_by_hand(order):
    costs = add_sum(order=order)
    assert costs.by_kernel == (("add_sum", ONCE),) and total(costs) == ONCE
    assert costs.moved == costs.read + costs.written


def test_a_row_read_twice_is_seen():
    assert add_sum(1).read == 2 * ONCE.read


def test_a_serial_scan_is_seen():
    costs = add_sum(2)
    assert costs.longest_loop == THREADS and costs.shuffles == 0 and costs.read == ONCE.read


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("races", [False, True])
def test_copies_products_and_draws(late_copies, races):
    kernels = load(SOURCE, Case(costs=True, late_copies=late_copies, races=races))
    tiles, launches = 3, 2
    x, count = torch.ones(tiles * 512, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    kernels.multiply_launch(x, count, torch.empty(32, dtype=torch.int32), tiles, launches, None)
    assert count.item() == launches
    once = Costs(
        read=4,  # the atomic's
        written=4 + 32 * 4,
        copied=tiles * (64 - 4) * 16,
        mma=tiles,
        ldmatrix=2 * tiles,
        votes=1,
        philox=32 * tiles,
        warp_barriers=2 * tiles,
        longest_loop=tiles,
        blocks=1,
    )
    assert kernels.costs.by_kernel == (("multiply", once),) * launches
    twice = {name: launches * value for name, value in vars(once).items() if name != "by_kernel"}
    assert total(kernels.costs) == Costs(**twice | {"longest_loop": tiles})


def test_without_costs_nothing_is_counted():
    kernels = load(SOURCE, Case())
    kernels.add_sum_launch(torch.ones(THREADS), torch.ones(1), torch.empty(THREADS), 1, 0, None)
    assert kernels.costs == Costs()
