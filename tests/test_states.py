"""Resumable states: of any ZeRO stage and precision; what is damaged is named and the one before used."""

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from states import load_state, save_state, small, steps
from torch import Tensor

from mtfast.config import ConfigError
from mtfast.models.checkpoint import CheckpointError
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Due, Keeper
from mtfast.training.engine.state import Found, newest_state, read_state, states_in

KINDS = list(itertools.product(("fp32", "bf16"), range(4)))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def written(request, tmp_path_factory) -> tuple[tuple[str, int], Path, list[float], dict[str, Tensor]]:
    """How a state was written, where it is, the losses of three steps after it and what they have led to."""
    directory = tmp_path_factory.mktemp("states")
    engine = small(*request.param)
    steps(engine, range(3))
    save_state(engine, directory, 3, {})
    losses = steps(engine, range(3, 6))
    weights = engine.state_dict()
    engine.close()
    return request.param, directory, losses, weights


@pytest.mark.parametrize("zero_stage", range(4))
def test_a_state_is_gone_on_from_under_any_zero_stage(zero_stage, written):
    (precision, of), directory, losses, weights = written
    engine = small(precision, zero_stage)
    load_state(engine, directory)
    assert engine.state_dict()["steps"] == 3
    found, ours = steps(engine, range(3, 6)), engine.state_dict()
    engine.close()
    if zero_stage == of:
        assert found == losses and same(ours, weights)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
    for name, x in ours.items():
        torch.testing.assert_close(x, weights[name], rtol=1e-5, atol=1e-7)


def test_a_state_may_go_on_in_another_precision(tmp_path):
    engine = small("bf16", 1)
    steps(engine, range(3))
    save_state(engine, tmp_path, 3, {})
    exact = engine.state_dict()
    engine.close()
    engine = small("fp32", 2)
    load_state(engine, tmp_path)
    assert same(engine.state_dict(), exact)
    engine.close()


def test_a_state_from_before_the_first_update_goes_on(tmp_path):
    """The optimizer has nothing to tell yet where every step so far was left out."""
    for kind in KINDS:
        engine = small(*kind)
        save_state(engine, tmp_path, 0, {})
        right = steps(engine, range(2))
        engine.close()
        engine = small(*kind)
        load_state(engine, tmp_path)
        assert steps(engine, range(2)) == right
        engine.close()


def test_a_state_of_another_model_is_refused(tmp_path):
    engine = small()
    save_state(engine, tmp_path, 1, {})
    engine.close()
    engine = small(hidden=6)
    before = engine.state_dict()
    with pytest.raises(CheckpointError, match=r"of another model, in which 0\.bias differs"):
        load_state(engine, tmp_path)
    assert same(engine.state_dict(), before)
    engine.close()


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    _overwrite(file, bytes(content))


def truncate(file: Path) -> None:
    _overwrite(file, file.read_bytes()[:-3])


def empty(file: Path) -> None:
    _overwrite(file, b"")


def _overwrite(file: Path, content: bytes) -> None:
    file.unlink()  # other names of the file stay as they are
    file.write_bytes(content)


OWN = ("state.safetensors", "state.json", "manifest.json")
SPOILS: list[Callable[[Path], None]] = [flip, truncate, empty, Path.unlink]


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    """Whose states of steps 1, 2 and 3 are in `tmp_path` / "state", with a checkpoint in each."""
    engine = small()
    best = tmp_path / "best-mean"
    best.mkdir()
    keeper = Keeper(engine)
    for step in (1, 2, 3):
        _write_checkpoint(best, step)
        keeper.keep(None, Due(tmp_path / "state", step, {"step": step}, [best], keep=3))
        keeper.wait()
    yield engine
    engine.close()


def _write_checkpoint(directory: Path, step: int) -> None:
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_text(f"{name} of step {step}")


def found_in(directory: Path) -> Found:
    found = newest_state(directory / "state")
    assert found is not None
    return found


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", [*OWN, "best-mean/model.safetensors", "best-mean/config.json"])
def test_a_damaged_newest_state_is_named_and_the_one_before_used(name, spoil, engine, tmp_path):
    assert found_in(tmp_path) == Found(tmp_path / "state" / "step-3", ("best-mean",), ())
    spoil(tmp_path / "state" / "step-3" / name)
    found = found_in(tmp_path)
    assert found.path.name == "step-2" and found.best == ("best-mean",)
    assert load_state(engine, tmp_path / "state") == {"step": 2}
    (fault,) = found.faults
    damaged = r"is missing|is damaged|bytes and should have"
    assert re.match(rf"{tmp_path}/state/step-3/(manifest\.json|{name}) .*({damaged})", fault), fault


def test_two_damaged_states_are_named_and_the_one_before_used(engine, tmp_path):
    flip(tmp_path / "state/step-3/state.json")
    shutil.rmtree(tmp_path / "state/step-2")
    (tmp_path / "state/step-2").mkdir()
    found = found_in(tmp_path)
    assert found.path.name == "step-1" and [bool(re.search("step-3|step-2", x)) for x in found.faults]


def test_where_all_are_damaged_each_is_named(engine, tmp_path):
    for step in (1, 2, 3):
        truncate(tmp_path / f"state/step-{step}/state.safetensors")
    with pytest.raises(ConfigError) as raised:
        newest_state(tmp_path / "state")
    text = str(raised.value)
    assert all(f"step-{step}/state.safetensors has " in text for step in (1, 2, 3))
    assert text.endswith(f"or remove {tmp_path}/state to start the stage again.")


def test_training_goes_on_without_a_best_checkpoint_that_is_damaged_in_every_state(engine, tmp_path):
    for step in (1, 2, 3):
        flip(tmp_path / f"state/step-{step}/best-mean/model.safetensors")
    found = found_in(tmp_path)
    assert found.path.name == "step-3" and found.best == ()
    assert len(found.faults) == 1 and "step-3/best-mean/model.safetensors is damaged" in found.faults[0]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_states_are_kept(keep, engine, tmp_path):
    keeper = Keeper(engine)
    for step in (4, 5):
        keeper.keep(None, Due(tmp_path / "state", step, {}, keep=keep))
        keeper.wait()
    assert [path.name for path in states_in(tmp_path / "state")] == [
        f"step-{step}" for step in (1, 2, 3, 4, 5)
    ][-keep:]


def test_states_after_the_one_gone_on_from_are_removed(engine, tmp_path):
    flip(tmp_path / "state/step-3/state.json")
    keeper = Keeper(engine)
    keeper.keep(None, Due(tmp_path / "state", 2, {"again": True}, keep=2))
    keeper.wait()
    assert [path.name for path in states_in(tmp_path / "state")] == ["step-1", "step-2"]
    assert read_state(tmp_path / "state/step-2").client == {"again": True}


def test_reading_a_state_executes_nothing(engine, tmp_path, monkeypatch):
    """A pickle in place of the tensors is not opened, also where the manifest calls it whole."""
    from mtfast.durable import write_manifest

    class Executed:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    for step in (1, 2, 3):
        state = tmp_path / f"state/step-{step}"
        torch.save({"weight.0.bias": Executed()}, state / "state.safetensors")
        write_manifest(state)
    with pytest.raises(CheckpointError, match="torn or not a file of tensors"):
        load_state(engine, tmp_path / "state")
    assert not (tmp_path / "executed").exists()
