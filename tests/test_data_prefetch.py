"""The thread that works ahead."""

import threading
import time

import pytest
from patience import PATIENCE

from mtfast.data.prefetch import prefetch


def test_prefetch_keeps_order_and_works_ahead():
    made = []

    def produce():
        for item in range(20):
            made.append(item)
            yield item

    iterator = prefetch(produce(), depth=3)
    assert next(iterator) == 0
    deadline = time.monotonic() + PATIENCE
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # 1 taken, 3 waiting, 1 that waits for room
    assert list(iterator) == list(range(1, 20))


def test_prefetch_raises_what_its_source_raised_after_the_items_before_it():
    def produce():
        yield 1
        yield 2
        raise RuntimeError("disk on fire")

    seen = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        for item in prefetch(produce(), depth=1):
            seen.append(item)
    assert seen == [1, 2]


@pytest.mark.parametrize("how", ["closed", "dropped", "broken out of"])
def test_prefetch_stops_its_thread_when_abandoned(how):
    before = set(threading.enumerate())

    def produce():
        while True:
            yield 0

    iterator = prefetch(produce(), depth=1)
    if how == "broken out of":
        for _ in iterator:
            break
    else:
        next(iterator)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    if how == "closed":
        iterator.close()
    del iterator
    thread = started.pop()
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()


def test_prefetch_wants_a_depth():
    with pytest.raises(ValueError, match="depth must be at least 1, found 0"):
        next(prefetch([1], depth=0))
