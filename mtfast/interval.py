"""How often something is done as a run goes on: every so many steps or epochs, or after some time."""

from __future__ import annotations

import re
from dataclasses import dataclass

WANTED = "be a number of steps, of epochs or a time, such as '200 steps', '1 epoch' or '10 minutes'"
_SECONDS = {"second": 1, "minute": 60, "hour": 3600}
# More digits than these count nothing that ends.
_TEXT = re.compile(rf"(\d{{1,18}}) +(step|epoch|{'|'.join(_SECONDS)})s?", re.ASCII)


@dataclass(frozen=True)
class Interval:
    """So many steps, epochs or seconds; the two that it is not are None."""

    steps: int | None = None
    epochs: int | None = None
    seconds: int | None = None


def parse_interval(text: str) -> Interval:
    """The interval that a text such as "200 steps", "1 epoch", "10 minutes", "30 seconds" or "1 hour" names.

    Raises:
        ValueError: it names none, or one of no length.
    """
    found = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
    number = int(found[1]) if found else 0
    if found is None or number < 1:
        raise ValueError(f"{text!r} must {WANTED}")
    unit = found[2]
    if unit in _SECONDS:
        return Interval(seconds=number * _SECONDS[unit])
    return Interval(steps=number) if unit == "step" else Interval(epochs=number)


def is_interval(text: str) -> bool:
    try:
        parse_interval(text)
    except ValueError:
        return False
    return True
