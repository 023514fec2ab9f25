"""The command wherever and however it is started: its options, its help, and what it says of wrong ones."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from mtfast import cli
from mtfast.experiments import ALL_RECIPES
from mtfast.invocation import COMMANDS
from mtfast.recipes import paper
from mtfast.training.engine import ranks

BIN = Path(sys.executable).parent
FROM_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


def started(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in FROM_LAUNCHERS} | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "mtfast"],
        [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "1", "--module", "mtfast"],
    ],
    ids=["python", "deepspeed"],
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
    for name in FROM_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.LaunchError, match=f"but {message}: start the run with deepspeed or torchrun"):
        ranks.prepare_environment()


@pytest.mark.parametrize(("told", "found"), [(None, "lo"), ("eth7", "eth7")])
def test_gloo_uses_the_network_through_which_rank_0_is_reached_unless_told(told, found, monkeypatch):
    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", told or "")
    if told is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**started, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ranks.prepare_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == found


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "0"]])
def test_launchers_rank_flag_is_accepted(flag, capsys):
    cli.main(["prepare", "paper", *flag, "--finetune.epochs", "2", "--print-config"])
    assert "epochs: 2" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--deepspeed_config", "ds.json"], ["--engine.deepspeed-config=ds.json"]])
def test_short_flags_are_the_dotted_ones(flag, capsys):
    cli.main(["finetune", "paper", *flag, "--strict", "--print-config"])
    printed = capsys.readouterr().out
    assert "deepspeed_config: ds.json" in printed and "strict: true" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly", "paper"], "no command 'fly'"),
        (
            ["run", "papier"],
            "no recipe 'papier', and no such file or directory; the recipes are demo, local, best, paper",
        ),
        (
            ["finetune"],
            "finetune needs a recipe, demo, local, best, paper, exp1, exp2, a configuration file or the",
        ),
        (["doctor", "demo"], "doctor takes no options, found 'demo'"),
        (["report", "demo", "--run-dir", "no/such/run"], "no/such/run holds no run to report on"),
        (
            ["heads", "paper", "--run-dir", f"{__file__}/run"],
            "test_command_line.py/run: Not a directory",
        ),
        (["run", "paper", "--model.dropout-p", "1.5"], r"model.dropout_p is 1.5"),
    ],
)
def test_command_line_errors_are_plain_sentences(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (
        ["--help"],
        ["fly"],
        ["run", "demo", "--print-config"],
        ["run", "demo", "--epoch", "3"],
    ):
        with contextlib.suppress(SystemExit):
            cli.main(arguments)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["finetune", "-h"], ["doctor", "--help"]])
def test_help_without_a_recipe_lists_commands_and_recipes(arguments, capsys):
    cli.main(arguments)
    text = capsys.readouterr().out
    for name in (*COMMANDS, "doctor", *ALL_RECIPES):
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)


def dotted_fields(holder: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every option's name, and whether it is a group of options that need no other words."""
    if is_dataclass(holder):
        holder = {field.name: getattr(holder, field.name) for field in fields(holder)}
    for name, value in holder.items():
        dotted = f"{prefix}{name}".replace("_", "-")
        if is_dataclass(value) or dotted == "tasks":
            yield from dotted_fields(value, f"{dotted}.")
        else:
            yield dotted, isinstance(value, dict) and bool(value)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "paper", "--help"])
    lines = [line.strip("╭─╮│ ") for line in capsys.readouterr().out.splitlines()]
    explained = dict(dotted_fields(paper()))
    assert {"run-dir", "tasks.sts.pair-input", "tasks.sst.splits", "model.mlp.width"} < set(explained)
    for name, is_group in explained.items():
        heading = rf"^{re.escape(name)} options" if is_group else rf"--{re.escape(name)}( |,|$)"
        place = next(i for i, line in enumerate(lines) if re.search(heading, line))
        said = "".join(lines[place + 1 : place + 4])
        assert re.match(r"[─-]*[\w`].*\.", said), f"--{name} is not explained: {said}"
