"""Delimited text as rows of fields, each with its line.

A field that begins with a quote ends at the next quote that is not doubled, in the same line or a later one.
A sentence that merely begins with a quote looks the same, and would take the rows up to some later quote into
it. So the lines of a row that goes over several are looked at by themselves, as if quotes meant nothing:

- The first and the last one, or, where tabs separate, one between them, have as many fields as the header (a
  comma before a space is not counted, it is prose's): the quote is a stray one. Its line cannot be used;
  reading goes on with the next line, so that no other row is lost.
- Otherwise the row has line breaks in it, and is marked as `odd`; one that is badly quoted or has too many or
  too few fields is unusable in each of its lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass


class UnclosedQuoteError(Exception):
    """A quote in ``line`` begins a field and none ends it: it swallows every row that follows."""

    def __init__(self, line: int) -> None:
        super().__init__(f"a quoted field begins in line {line} and is not closed")
        self.line = line


@dataclass(frozen=True)
class Row:
    """Where a row begins (lines count from 1), its fields, and why it cannot be used if it cannot.

    ``odd`` if a quoted field of it holds what ends a field or row in most files of the kind: a line break, or
    a tab where tabs separate.
    """

    line: int
    fields: list[str]
    problem: str | None = None
    odd: bool = False


def split_rows(text: str, delimiter: str) -> Iterator[Row]:
    """The header and the rows of a text whose lines end with LF or CRLF; blank lines are left out.

    Fields longer than the csv module takes and carriage returns within a line are read like any text.
    Raises UnclosedQuoteError.
    """
    position, line, wanted = 0, 1, 0
    while position < len(text):
        fields, end, problem = _fields(text, position, line, delimiter, wanted)
        whole = text[position:end].removesuffix("\r")
        breaks = whole.count("\n")
        if wanted and problem is None and len(fields) != wanted:
            problem = f"{len(fields)} fields where the header has {wanted}"
        if not wanted and whole:
            if breaks and problem is None:
                problem = f"a name in the header begins with a quote and goes on to line {line + breaks}"
            wanted = len(fields)
            yield Row(line, fields, problem)
        elif breaks and _is_stray(whole, delimiter, wanted):
            reason = f"a quote begins a field here and takes in rows of their own, up to line {line + breaks}"
            yield Row(line, [], f"{reason}: one that belongs to the text is doubled, in a quoted field")
            end, breaks = _line_end(text, position), 0
        elif breaks and problem is not None:
            yield Row(line, [], f"{problem}, in lines {line} to {line + breaks}")
            for number, part in enumerate(whole.split("\n")[1:], start=line + 1):
                if part.removesuffix("\r"):
                    yield Row(number, [], f"belongs to the row that begins in line {line}: {problem}")
        elif whole:
            odd = bool(breaks) or (delimiter == "\t" and any("\t" in field for field in fields))
            yield Row(line, fields, problem, odd)
        position, line = end + 1, line + breaks + 1


def _is_stray(row: str, delimiter: str, wanted: int) -> bool:
    """Whether lines of a row over several lines are rows by themselves, as the module's description says."""

    def is_row(line: str) -> bool:
        return 1 + line.count(delimiter) - (line.count(", ") if delimiter == "," else 0) == wanted

    if wanted < 2:  # every line would be one
        return False
    first, *between, last = row.split("\n")
    return (is_row(first) and is_row(last)) or (delimiter == "\t" and any(map(is_row, between)))


def _fields(
    text: str, begin: int, line: int, delimiter: str, wanted: int
) -> tuple[list[str], int, str | None]:
    """The fields of the row at ``begin``, where its last line ends, and what is wrong with its quotes.

    A row that has gone over its first line and has more fields than ``wanted`` is not read on.
    """
    end = first_end = _line_end(text, begin)
    if text.find('"', begin, end) < 0:
        return text[begin:end].removesuffix("\r").split(delimiter), end, None
    fields, position = [], begin
    while True:
        if text.startswith('"', position):
            closing = _closing_quote(text, position + 1)
            if closing < 0:
                raise UnclosedQuoteError(line + text.count("\n", begin, position))
            fields.append(text[position + 1 : closing].replace('""', '"'))
            if closing > end:
                end = _line_end(text, closing)
            position = closing + 1
            if position == end or (position == end - 1 and text[position] == "\r"):
                return fields, end, None
            if text[position] != delimiter:
                return fields, end, f"bad quoting: {delimiter!r} expected after the quote that ends a field"
            if end > first_end and 0 < wanted <= len(fields):
                return fields, end, f"more fields than the {wanted} of the header"
        else:
            stop = text.find(delimiter, position, end)
            if stop < 0:
                fields.append(text[position:end].removesuffix("\r"))
                return fields, end, None
            fields.append(text[position:stop])
            position = stop
        position += 1


def _closing_quote(text: str, begin: int) -> int:
    """Where the next quote is that is not doubled, or -1."""
    while (place := text.find('"', begin)) >= 0 and text.startswith('"', place + 1):
        begin = place + 2
    return place


def _line_end(text: str, begin: int) -> int:
    """Where the next line feed is, or the end of the text."""
    place = text.find("\n", begin)
    return len(text) if place < 0 else place
