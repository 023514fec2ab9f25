"""Delimited text as rows of fields, each with its line.

A field that begins with a quote ends at the next quote that is not doubled, in the same line or a later one.
A sentence that begins with a stray quote looks the same, and would swallow the rows up to some later quote.
So where a row spans several lines, the fields of each line are also counted with quotes ignored:

- If the first and the last line, or with tabs as delimiter one between them, have as many fields as the
  header (a comma before a space counts as prose, not as a delimiter), the quote is a stray one. Its line is
  unusable; reading goes on with the next line, so that no other row is lost.
- Otherwise the row has line breaks in it, and is marked as `odd`; one that is badly quoted or has too many or
  too few fields is unusable, and each of its lines is reported.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from mtfast.data.files import decode_utf8
from mtfast.data.rows import DataError, Record, Records, listed, repeated


class UnclosedQuoteError(Exception):
    """A quote in ``line`` begins a field that is never closed: it would swallow every row that follows."""

    def __init__(self, line: int) -> None:
        super().__init__(f"a quoted field begins in line {line} and is not closed")
        self.line = line


@dataclass(frozen=True)
class Row:
    """A row: the line it begins in (from 1), its fields, and the reason if it is unusable.

    ``odd`` if a quoted field holds a line break or, in tab-separated text, a tab: legal, but rare enough to
    be reported.
    """

    line: int
    fields: list[str]
    problem: str | None = None
    odd: bool = False


def read_delimited(path: Path, delimiter: str | None = None, only: Container[int] | None = None) -> Records:
    """The rows of a file whose fields ``delimiter`` separates: by default a tab if the header has one, else a
    comma. ``only`` has the numbers (from 0) of those to keep. DataError for a file without a usable header,
    or with a quote that is not closed."""
    text = decode_utf8(path)
    if delimiter is None:
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = _rows(path, text, delimiter)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}:1: no header row")
    if header.problem is not None:
        raise DataError(f"{path}:{header.line}: {header.problem}")
    columns = header.fields
    if any("\r" in name for name in columns):
        raise DataError(
            f"{path}:{header.line}: a carriage return in the header; lines should end with LF or CRLF"
        )
    if duplicated := repeated(name for name in columns if name):
        raise DataError(f"{path}:{header.line}: column names appear twice: {listed(duplicated)}")
    records: list[Record] = []
    odd: list[int] = []
    count = 0
    for number, row in enumerate(rows):
        count = number + 1
        if row.odd and row.problem is None:
            odd.append(row.line)
        if only is None or number in only:
            values = {} if row.problem is not None else dict(zip(columns, row.fields, strict=True))
            records.append(Record(str(path), row.line, values, row.problem))
    what = "line breaks or tabs" if delimiter == "\t" else "line breaks"
    notes = (f"{path.name}: {len(odd):,} rows with quoted {what}, in line {listed(odd)}",) if odd else ()
    return Records(str(path), columns, records, notes, count - len(records))


def _rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """`split_rows` of a file; DataError for a quote that is not closed."""
    try:
        yield from split_rows(text, delimiter)
    except UnclosedQuoteError as error:
        raise DataError(
            f"{path}:{error.line}: a quoted field begins here and is not closed; "
            "a quote that belongs to the text is doubled, in a quoted field"
        ) from None


def split_rows(text: str, delimiter: str) -> Iterator[Row]:
    """The header and the rows of a text whose lines end with LF or CRLF, without blank lines.

    Unlike in the csv module, the length of a field has no limit and a carriage return within a line is text.
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
    """Whether a row over several lines comes from a stray quote: the module's docstring has the rule."""

    def is_row(line: str) -> bool:
        return 1 + line.count(delimiter) - (line.count(", ") if delimiter == "," else 0) == wanted

    if wanted < 2:  # any line has one field
        return False
    first, *between, last = row.split("\n")
    return (is_row(first) and is_row(last)) or (delimiter == "\t" and any(map(is_row, between)))


def _fields(
    text: str, begin: int, line: int, delimiter: str, wanted: int
) -> tuple[list[str], int, str | None]:
    """The fields of the row at ``begin``, the end of its last line, and the fault in its quoting, if any.

    Stops early in a row that spans lines and has more fields than ``wanted``.
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
    """Index of the next quote that is not doubled, or -1."""
    while (index := text.find('"', begin)) >= 0 and text.startswith('"', index + 1):
        begin = index + 2
    return index


def _line_end(text: str, begin: int) -> int:
    """Index of the next line feed, or of the end of the text."""
    index = text.find("\n", begin)
    return len(text) if index < 0 else index
