"""Draws packed_step.svg, the README's picture of a packed mixed-task step: `python docs/packed_step.py`."""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, EDGE = 1000, 634, 24
INK, GREY, LINE, CARD = "#1d2329", "#5b646d", "#c9d0d7", "#ffffff"
COLOURS = {"sst": "#0072B2", "quora": "#C75000", "sts": "#00805E"}
PALE = {"sst": "#DCEBF5", "quora": "#FBE6D8", "sts": "#D9EEE6"}
SENTENCES = [
    ("sst", "warm and funny"),
    ("quora", "who directed it ?"),
    ("quora", "whose film is it ?"),
    ("sts", "a man sings"),
    ("sts", "a girl sings"),
]
# Word pieces of sentences in one step's sub-batches of the real data, every few rows.
PADDED = {
    "sst": (21, 9, 42, 15, 30, 24),
    "quora": (13, 11, 17, 52, 9, 14),
    "sts": (10, 14, 27, 12, 48, 9),
}


class Picture:
    """SVG elements in the order they are drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        stroke: str = "none",
        r: float = 4.0,
        extra: str = "",
    ) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}" fill="{fill}" '
            f'stroke="{stroke}" {extra}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 13,
        fill: str = INK,
        anchor: str = "middle",
        weight: int = 400,
        mono: bool = False,
    ) -> None:
        family = ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"' if mono else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{family}>{escape(words)}</text>'
        )

    def line(
        self, points: list[tuple[float, float]], stroke: str = GREY, width: float = 1.4, arrow: bool = False
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        head = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" '
            f'stroke-linejoin="round"{head}/>'
        )

    def save(self, path: Path) -> None:
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            "<title>A packed mixed-task step: the sentences of three tasks in one run of tokens, one encoder "
            "pass, three heads, one sum of losses; below, the same sentences padded</title>\n"
            "<defs>\n"
            '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0.8 L7,4 L0,7.2 z" fill="{GREY}"/></marker>\n'
            '<pattern id="waste" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f3f4f6"/>'
            '<rect width="1.6" height="6" fill="#d5dade"/></pattern>\n'
            "</defs>\n"
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{CARD}"/>\n{body}\n</svg>\n',
            encoding="utf-8",
        )


def main() -> None:
    picture = Picture()
    heading = "One step: the sentences of all three tasks, back to back"
    picture.text(EDGE, 36, heading, 17, anchor="start", weight=600)
    cls = _tokens(picture, y=66)
    _encoder(picture, cls, y=172)
    _heads(picture, cls, y=262)
    _padded(picture, y=492)
    picture.save(Path(__file__).with_name("packed_step.svg"))


def _tokens(picture: Picture, y: float) -> list[float]:
    """The packed row with its cu_seqlens; returns the middle of each [CLS]."""
    rows = [(task, ["[CLS]", *words.split(), "[SEP]"]) for task, words in SENTENCES]
    letters = sum(len(token) for _, tokens in rows for token in tokens)
    cells = sum(len(tokens) for _, tokens in rows)
    pad = 9.0
    letter = (WIDTH - 2 * EDGE - cells * pad) / letters
    x, count, middles = float(EDGE), 0, []
    for index, (task, tokens) in enumerate(rows):
        begin = x
        for place, token in enumerate(tokens):
            width = len(token) * letter + pad
            special = token.startswith("[")
            picture.box(x + 0.75, y, width - 1.5, 30, COLOURS[task] if place == 0 else PALE[task])
            colour = "#ffffff" if place == 0 else COLOURS[task] if special else INK
            picture.text(x + width / 2, y + 19.5, token, 10.5 if special else 12, colour)
            if place == 0:
                middles.append(x + width / 2)
            x += width
        picture.line([(begin, y + 36), (begin, y + 46)], INK, 1.2)
        picture.text(max(begin, EDGE + 4), y + 60, str(count), 12, INK, mono=True)
        count += len(tokens)
        if index in (0, 1, 3):
            label = {0: "SST sentence", 1: "Quora pair", 3: "STS pair"}[index]
            picture.text(begin + 2, y - 8, label, 12.5, COLOURS[task], "start", 600)
    picture.line([(x, y + 36), (x, y + 46)], INK, 1.2)
    picture.text(x - 7, y + 60, str(count), 12, INK, mono=True)
    picture.text(WIDTH / 2, y + 82, "cu_seqlens: where each sequence begins. No padding.", 12.5, GREY)
    return middles


def _encoder(picture: Picture, cls: list[float], y: float) -> None:
    picture.box(EDGE, y, WIDTH - 2 * EDGE, 52, "#EEF1F4", LINE, 8)
    picture.text(WIDTH / 2, y + 22, "BERT, one pass over the packed tokens", 15, weight=600)
    note = "attention stays inside each sequence; the last layer computes the [CLS] rows alone"
    picture.text(WIDTH / 2, y + 41, note, 12.5, GREY)
    for middle in cls:
        picture.line([(middle, y + 52), (middle, y + 88)], arrow=True)


def _heads(picture: Picture, cls: list[float], y: float) -> None:
    """Sentiment head, shared pair MLP, three losses and their sum."""
    left, right = cls[1] - 30, WIDTH - EDGE
    sentiment = (EDGE, cls[1] - 56 - EDGE)
    picture.box(sentiment[0], y, sentiment[1], 44, PALE["sst"], COLOURS["sst"], 6)
    picture.text(sentiment[0] + sentiment[1] / 2, y + 27, "sentiment: softmax", 13.5)
    picture.box(left, y, right - left, 44, "#F2F4F6", LINE, 6)
    picture.text(
        (left + right) / 2,
        y + 27,
        "one MLP on both [CLS] vectors of a pair, with two outputs: paraphrase and similarity",
        13.5,
    )
    losses = (
        ("sst", sentiment[0] + sentiment[1] / 2, "cross entropy"),
        ("quora", (cls[1] + cls[2]) / 2 + 40, "logistic loss"),
        ("sts", (cls[3] + cls[4]) / 2 + 30, "squared error"),
    )
    for task, x, name in losses:
        picture.line([(x, y + 44), (x, y + 74)], arrow=True)
        picture.box(x - 66, y + 76, 132, 34, PALE[task], COLOURS[task], 17)
        picture.text(x, y + 98, name, 13.5, COLOURS[task], weight=600)
    middle = losses[1][1]
    for task, x, _ in losses:
        if task == "quora":
            picture.line([(x, y + 110), (x, y + 144)], arrow=True)
        else:
            stop = middle - 104 if x < middle else middle + 104
            picture.line([(x, y + 110), (x, y + 162), (stop, y + 162)], arrow=True)
    picture.box(middle - 102, y + 146, 204, 34, INK, r=17)
    picture.text(middle, y + 168, "sum: one backward pass", 13.5, "#ffffff", weight=600)


def _padded(picture: Picture, y: float) -> None:
    """Three padded sub-batches, faint, with what is wasted."""
    picture.line([(EDGE, y - 22), (WIDTH - EDGE, y - 22)], LINE, 1)
    picture.text(EDGE, y + 6, "Instead of: each task padded to its longest sentence", 14, GREY, "start", 600)
    gap = 20
    width = (WIDTH - 2 * EDGE - 2 * gap) / 3
    for column, (task, lengths) in enumerate(PADDED.items()):
        x, longest = EDGE + column * (width + gap), max(lengths)
        for row, length in enumerate(lengths):
            top = y + 24 + row * 16
            picture.box(x, top, width, 12, "url(#waste)", r=2)
            picture.box(
                x, top, width * length / longest, 12, PALE[task], COLOURS[task], 2, 'stroke-opacity="0.35"'
            )
    picture.text(
        WIDTH - EDGE, y + 6, "shaded: padding, two thirds of a step of 160 examples", 12.5, GREY, "end"
    )


if __name__ == "__main__":
    main()
