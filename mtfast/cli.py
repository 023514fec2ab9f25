"""The command line: `mtfast COMMAND RECIPE_FILE_OR_RUN --dotted.option value`.

`mtfast doctor` needs nothing but torch; what the other commands need is imported for them alone.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from mtfast.launcher import answer, end_process, fail
from mtfast.packages import MissingExtra, explained


def run_process() -> NoReturn:
    """Entry point of `mtfast` and `python -m mtfast`: `main`, and with it the process."""
    code = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    end_process(code)


def main(argv: list[str] | None = None) -> None:
    """Run a command. Raises SystemExit where it fails."""
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _main(argv: list[str] | None) -> None:
    arguments = _without_launcher_flags(list(sys.argv[1:] if argv is None else argv))
    if arguments[:1] == ["doctor"] and arguments[1:2] not in (["-h"], ["--help"]):
        if len(arguments) > 1:
            fail(f"doctor takes no options, found {arguments[1]!r}")
        from mtfast import doctor

        answer(doctor.render())
        return
    try:
        with explained():
            from mtfast import invocation

            invocation.invoke(arguments)
    except MissingExtra as error:
        fail(str(error))


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop the rank that launchers append; the environment says it too."""
    kept = []
    skip = False
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if skip:
            skip = False
        elif flag in ("--local_rank", "--local-rank"):
            skip = not value
        else:
            kept.append(argument)
    return kept
