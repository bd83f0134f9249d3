"""A self-contained HTML page: text, tables, pictures and videos in one file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2430; --paper: #ffffff; --soft: #5b6675; --line: #d9dee6; --accent: #2463a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181e; --soft: #98a3b3; --line: #323a46; --accent: #7db4f0; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; color: var(--accent); }
p.note, figcaption { color: var(--soft); font-size: .92rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; background: #fff; border-radius: 6px; }
video { image-rendering: pixelated; border-radius: 6px; width: 192px; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; } .row figure { margin: 0; max-width: 14rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .9em; }
"""


class Page:
    """Collects blocks and writes them as one HTML file; every text is escaped."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._blocks = [f"<h1>{html.escape(title)}</h1>"]
        if subtitle:
            self._blocks.append(f'<p class="note">{html.escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        """Start a section."""
        self._blocks.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; numbers are set to the right with at most four significant digits."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self._blocks.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, path: Path, caption: str) -> None:
        """Embed a PNG."""
        source = _data_uri(path, "image/png")
        text = html.escape(caption)
        self._blocks.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')

    def videos(self, videos: Iterable[tuple[Path, str]]) -> None:
        """Embed mp4 files side by side, each with a caption."""
        figures = [
            f'<figure><video src="{_data_uri(path, "video/mp4")}" controls loop muted autoplay playsinline></video>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for path, caption in videos
        ]
        self._blocks.append(f'<div class="row">{"".join(figures)}</div>')

    def write(self, path: Path) -> None:
        """Write the page; a reader never sees half of it."""
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._blocks)
            + "\n</body></html>\n"
        )
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number">{text}</td>'


def _data_uri(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
