"""Whether the other processes of a run are alive, so that none waits for one that is gone.

A process that is killed tells nobody. Under gloo the others' collectives end with a closed connection, under
NCCL they wait, ten minutes by default. So every process gives signs of life through the group's store, from
a thread beside the one that trains, and ends itself where another's stay out.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from typing import Any, NoReturn

import torch.distributed as dist

from . import ranks

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # after which a process is taken for dead
LEAVING_SECONDS = 10.0  # in which a process that knows of a failure should have left by itself
FAILED, PRINTED = "mtfast/failed", "mtfast/printed"

_starts = itertools.count()  # all ranks keep the same ones
_watch: Watch | None = None


def start() -> None:
    """Give signs of life, and look for those of the others, until `finish`; nothing for a single process."""
    global _watch
    store = ranks.store()
    if store is not None and _watch is None:
        _watch = Watch(store)


def finish() -> None:
    """Wait until all ranks are through: with rank 0 ends the store that the others may still need."""
    global _watch
    if dist.is_initialized():
        ranks.barrier()
    if _watch is not None:
        _watch.ended.set()
        _watch = None


def silent(seconds: float) -> list[str]:
    """Whereabouts of the processes that have given no sign of life for so long."""
    return [] if _watch is None else _watch.silent(seconds)


class Watch:
    """This process's signs of life, and when each of the others that has begun to gave its last."""

    def __init__(self, store: Any) -> None:
        self._store = store.clone()  # the other threads' operations may block
        self._prefix = f"mtfast/alive/{next(_starts)}"
        self._store.set(f"{self._prefix}/where/{ranks.rank()}", ranks.whereabouts())
        self._beats = dict.fromkeys((r for r in range(ranks.world_size()) if r != ranks.rank()), 0)
        self._where: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._failed_at: float | None = None
        # Waits since the store's last answer: counted, not timed, as this process may have been held itself.
        self._unanswered = 0
        self.ended = threading.Event()
        threading.Thread(target=self._run, name="mtfast-alive", daemon=True).start()
        threading.Thread(target=self._await_answers, name="mtfast-answers", daemon=True).start()

    def silent(self, seconds: float) -> list[str]:
        now = time.monotonic()
        return [self._where[rank] for rank, heard in list(self._heard.items()) if now - heard > seconds]

    def _run(self) -> None:
        try:
            while not self.ended.is_set():
                self._beat()
                self._unanswered = 0
                if found := self.silent(SILENT_SECONDS):
                    self._end(
                        f"{', '.join(found)} gave no sign of life for {SILENT_SECONDS:.0f} s: killed, or the "
                        "machine is gone; the same command continues the run"
                    )
                if self._failed_at is not None and time.monotonic() - self._failed_at > LEAVING_SECONDS:
                    self._end("")
                self.ended.wait(BEAT_SECONDS)
        except Exception:  # torch raises several kinds where the store cannot be reached
            if not self.ended.wait(LEAVING_SECONDS):
                print(f"{ranks.whereabouts()}: lost the connection to rank 0", file=sys.stderr)
                _end_process()

    def _await_answers(self) -> None:
        """End this process where the store, which is rank 0's, is silent: who asks it then waits for ever."""
        seconds = SILENT_SECONDS + LEAVING_SECONDS
        while not self.ended.wait(BEAT_SECONDS):
            self._unanswered += 1
            if self._unanswered * BEAT_SECONDS > seconds:
                reason = f"rank 0 has given no answer for {seconds:.0f} s: it hangs, or the network is gone"
                text = f"mtfast: {ranks.whereabouts()}: {reason}; the same command continues the run"
                print(text, file=sys.stderr)
                _end_process()

    def _beat(self) -> None:
        self._store.add(f"{self._prefix}/{ranks.rank()}", 1)
        now = time.monotonic()
        for rank, before in self._beats.items():
            beats = self._store.add(f"{self._prefix}/{rank}", 0)
            if beats == before:
                continue
            if rank not in self._where:
                self._where[rank] = self._store.get(f"{self._prefix}/where/{rank}").decode()
            self._beats[rank], self._heard[rank] = beats, now
        if self._failed_at is None and self._store.check([FAILED]):
            self._failed_at = now

    def _end(self, reason: str) -> NoReturn:
        """End this process, whatever its other threads wait for; one of all gives the reason."""
        me = str(ranks.rank())
        if reason and self._store.compare_set(PRINTED, "", me) == me.encode():
            print(f"mtfast: {reason}", file=sys.stderr)
        if ranks.is_main():  # with which the store ends
            time.sleep(2 * BEAT_SECONDS)
        _end_process()


def _end_process() -> NoReturn:
    sys.stderr.flush()
    os._exit(1)
