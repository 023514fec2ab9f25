"""What a disk may do to a run: the n-th change below a directory fails, or the process ends in it.

Changes are counted in front of the C library (faults.cpp), through which Python and all that it calls write,
so that every one is reached. Only in processes of `processes.Ranks`, which begin with that.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
COUNT, FAIL_ONCE, FAIL_FROM, KILL = range(4)


@functools.cache
def preloaded() -> Path:
    """What those processes begin with; compiled where that was not done yet."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"mtfast-faults-{os.getuid()}-{digest}.so"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}")
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
        subprocess.run([*compiler, SOURCE, "-o", partial, "-ldl"], check=True)
        partial.rename(made)
    return made


def arm(directory: Path, number: int, mode: int, error: int = 0, changes: Path | None = None) -> None:
    """Let something happen to the change with this number, from 1, below `directory`.

    mode: COUNT nothing. FAIL_ONCE it fails with `error`; of a write one half is made. FAIL_FROM all later
        ones do too. KILL the process ends there.
    changes: file for a list of them, a line each: what is done, the path, that which a rename or link is of.
    """
    where, into = os.fsencode(directory.resolve()), os.fsencode(changes or "")
    ctypes.CDLL(None).faults_arm(where, ctypes.c_long(number), mode, error, into)


def disarm() -> int:
    """Nothing happens any more; how many changes there were."""
    function = ctypes.CDLL(None).faults_disarm
    function.restype = ctypes.c_long
    return function()
