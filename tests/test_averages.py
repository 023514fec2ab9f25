"""The moving average of the weights: by hand from the weights of every step, and what it is used for."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from processes import Ranks
from states import load_state, save_state, small, steps
from torch import Tensor

from mtfast.training.engine import alive
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Due, Keeper
from mtfast.training.engine.state import newest_state, read_state

DECAY = 0.7
KINDS = list(itertools.product(("fp32", "bf16"), range(4)))


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: x for name, x in engine.state_dict().items() if name != "steps"}


def by_hand(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of each step, every one counting DECAY times as much as the next."""
    shares = torch.tensor([DECAY ** (len(every) - 1 - k) for k in range(len(every))], dtype=torch.float64)
    shares /= shares.sum()
    return {
        name: sum(share * weights[name].double() for share, weights in zip(shares, every, strict=True))
        for name in every[0]
    }


def check(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, x in found.items():
        torch.testing.assert_close(x.double(), right[name].double(), rtol=1e-5, atol=1e-7)


def check_average(precision: str, zero_stage: int, directory: Path) -> None:
    """The average after every step, and what it is used for; goes on from a state under any ZeRO stage."""
    plain = small(precision, zero_stage)
    losses = steps(plain, range(6))
    plain.close()

    engine = small(precision, zero_stage, ema_decay=DECAY)
    before = weights_of(engine)
    with engine.averaged():  # of no step yet
        check(weights_of(engine), before)
    every = []
    for number in range(4):
        assert steps(engine, range(number, number + 1)) == [losses[number]]
        every.append(weights_of(engine))
        x = torch.randn(3, 7).to(next(engine.model.parameters()).dtype)
        with engine.averaged():
            check(weights_of(engine), right := by_hand(every))
            hidden = (x.double() @ right["0.weight"].T + right["0.bias"]).tanh()
            out = engine.model(x).double()
        expected = hidden @ right["2.weight"].T + right["2.bias"]
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if precision == "fp32" else 0.03)
        check(weights_of(engine), every[-1])
    save_state(engine, directory, 4, {})
    engine.close()

    for other in range(4):  # ZeRO stages
        engine = small(precision, other, ema_decay=DECAY)
        load_state(engine, directory)
        found = []
        for number in (4, 5):
            found += steps(engine, range(number, number + 1))
            every.append(weights_of(engine))
        with engine.averaged():
            check(weights_of(engine), by_hand(every))
        assert found == pytest.approx(losses[4:], rel=1e-5)
        del every[4:]
        engine.close()


@pytest.mark.parametrize(("precision", "zero_stage"), KINDS)
def test_the_average_is_of_the_weights_after_every_step(precision, zero_stage, tmp_path):
    check_average(precision, zero_stage, tmp_path)


def check_every_zero_stage(directory: Path) -> None:
    """On each rank of a run."""
    for precision, zero_stage in (("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)):
        check_average(precision, zero_stage, directory / f"{precision}-{zero_stage}")
    alive.finish()


def test_two_ranks_have_one_average(tmp_path):
    Ranks(check_every_zero_stage, tmp_path, output=tmp_path, world_size=2).succeed()


@pytest.mark.parametrize("due", [False, True])
def test_a_checkpoint_has_the_average_and_a_state_the_weights(due, tmp_path):
    engine = small("bf16", ema_decay=DECAY)
    every, written = [], []
    for number in range(3):
        steps(engine, range(number, number + 1))
        every.append(weights_of(engine))
    keeper = Keeper(engine)
    keeper.keep(
        lambda weights: written.append({name: x.clone() for name, x in weights.items()}),
        Due(tmp_path, 3, {}) if due else None,
    )
    keeper.wait()
    kept = written[0]
    assert kept.pop("steps") == 3
    check(kept, by_hand(every))
    if due:
        found = newest_state(tmp_path)
        assert found is not None
        state = read_state(found.path)
        check({name: x for name, x in state.weights.items() if name != "steps"}, every[-1])
    engine.close()
