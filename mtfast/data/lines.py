"""Plain text as records: on each line one text, or two with a tab between them."""

from mtfast.data.files import decoded
from mtfast.data.rows import Record, Records


def read_lines(raw: bytes, origin: str, columns: tuple[str, ...]) -> Records:
    """The lines of a text file as rows with the ``columns``, one or two; they end with LF or CRLF.

    ``origin`` is the file's name in messages. DataError for text that is not UTF-8.
    """
    lines = decoded(raw, origin).split("\n")
    if not lines[-1]:
        lines.pop()
    rows = [_record(origin, number, line.removesuffix("\r"), columns) for number, line in enumerate(lines, 1)]
    return Records(origin, list(columns), rows)


def _record(origin: str, number: int, line: str, columns: tuple[str, ...]) -> Record:
    texts = line.split("\t") if len(columns) > 1 else [line]
    if len(texts) != len(columns):
        problem = f"{len(texts) - 1} tabs; two texts with one tab between them are expected"
        return Record(origin, number, {}, problem if line.strip() else "empty line")
    return Record(origin, number, dict(zip(columns, texts, strict=True)))
