"""A page for people: Markdown, and the same as HTML that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from markdown_it import MarkdownIt

from mtfast.files import write_text


def write_page(directory: Path, title: str, parts: Iterable[str]) -> Path:
    """Write paragraphs of Markdown as `report.md` and, with the pictures in `plots/` inside, as `report.html`
    into `directory`, which is made; return the path of the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    markdown = "\n\n".join(part for part in parts if part) + "\n"
    write_text(directory / "report.md", markdown)
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(markdown)
    for picture in sorted((directory / "plots").glob("*.png")):
        encoded = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="plots/{picture.name}"', f'src="data:image/png;base64,{encoded}"')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    page = PAGE.replace("TITLE", title.replace("<", "&lt;")).replace("BODY", body)
    write_text(directory / "report.html", page)
    return directory / "report.html"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2329; background: #fff; max-width: 66rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #dfe3e8; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .75rem 0; }
th, td { padding: .38rem 1.3rem .38rem 0; border-bottom: 1px solid #e8ebef; text-align: left;
         font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #57606a; vertical-align: bottom; }
tr:last-child td { border-bottom-color: #b9c0c8; }
img { display: block; max-width: 100%; margin: 1.1rem 0; }
code { font-size: .88em; background: #f3f5f7; padding: .1em .3em; border-radius: 3px;
       overflow-wrap: anywhere; }
pre { background: #f3f5f7; padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .86rem; }
pre code { background: none; padding: 0; font-size: 1em; overflow-wrap: normal; }
</style>
<body>
BODY
</body>
</html>
"""
