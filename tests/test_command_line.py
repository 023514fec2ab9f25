"""The command wherever and however it is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
FROM_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


def started(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in FROM_LAUNCHERS} | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "mtfast"],
        [str(BIN / "torchrun"), "-m", "mtfast"],
        [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "1", "--module", "mtfast"],
    ],
    ids=["python", "torchrun", "deepspeed"],
)
def test_a_folder_called_mtfast_is_not_taken_for_the_package(command, tmp_path):
    """As the one above the clone has it."""
    (tmp_path / "mtfast" / "mtfast").mkdir(parents=True)
    done = started([*command, "evaluate", "local"], cwd=tmp_path)
    said = done.stdout + done.stderr
    assert "mtfast: runs/local holds no run" in said and "ImportError" not in said, said


@pytest.mark.parametrize("arguments", ["--help", "doctor", "run demo --help", "run demo --print-config"])
def test_a_reader_who_leaves_early_is_no_error(arguments, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mtfast", *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 'zero'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ],
)
def test_what_a_launcher_should_have_set_is_named(variables, message, monkeypatch):
    from mtfast.train import ranks

    for name in FROM_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.LaunchError, match=f"but {message}: start the run with deepspeed or torchrun"):
        ranks.prepare_environment()
