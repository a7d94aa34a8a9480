"""The few pieces of HTML that a report is made of; whatever is passed in as text is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import soundfile

PAUSE_SEC = 2.0  # between the beginnings of two words
AUDIO_LIMIT_SEC = 180.0  # about 1 MB of Vorbis for each clip
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222;
       background: #f6f7f8; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 32px 60px; background: #fff;
       box-shadow: 0 0 14px rgba(0, 0, 0, .06); }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 19px; margin: 38px 0 8px; padding-bottom: 4px; border-bottom: 1px solid #ddd; }
h3 { font-size: 15px; margin: 22px 0 4px; }
p, li { max-width: 860px; }
p.lead { color: #666; margin: 0 0 18px; }
.key { background: #f2f6fb; border-left: 4px solid #1f6fb4; padding: 10px 18px; margin: 14px 0; }
.key ul { margin: 4px 0; padding-left: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
th { text-align: left; background: #f0f2f4; font-weight: 600; vertical-align: bottom; }
th, td { padding: 5px 7px; border-bottom: 1px solid #e4e6e8; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
figure { margin: 16px 0 24px; }
figure img { max-width: 100%; box-sizing: border-box; border: 1px solid #e4e6e8; cursor: zoom-in; }
figure input { position: absolute; opacity: 0; }
figure input:checked + img { max-width: none; width: 200%; cursor: zoom-out; }
figure input:focus-visible + img { outline: 2px solid #1f6fb4; }
.warning { background: #fff4d6; border-left: 3px solid #c80; padding: 4px 10px; }
figcaption, .note { color: #555; font-size: 13px; max-width: 860px; }
audio { width: 100%; max-width: 700px; display: block; margin: 4px 0 2px; }
pre { background: #f6f7f8; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
code { background: #f0f2f4; padding: 0 3px; border-radius: 3px; font-size: 92%; }
summary { cursor: pointer; color: #1f6fb4; margin: 6px 0; }
.words { font-size: 13px; line-height: 1.5; margin: 2px 0 14px; }
.words span { color: #777; font-variant-numeric: tabular-nums; padding-left: 8px; }
@media (max-width: 1000px) { main { padding: 18px 16px 40px; } table { font-size: 12px; }
  th, td { padding: 4px 5px; } }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0 0 0 20px; max-width: 840px; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document that needs nothing but itself; `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # an empty icon, or browsers ask a server for one
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """The highlighted list of findings."""
    return f'<div class="key">{points(lines)}</div>'


def points(lines: Iterable[str]) -> str:
    """A plain list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> str:
    """A table; columns of numbers are right-aligned, None and NaN are shown as a dash.

    Args:
        header: column titles; without any the table has no head.
        rows: one value a column; text that is a number counts as one.
    """
    body = [[_cell(value) for value in row] for row in rows]
    numeric = [all(right for _, right in column) for column in zip(*body, strict=True)]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = (
            f'<{tag} class="number">{escape(text)}</{tag}>'
            if right
            else f"<{tag}>{escape(text)}</{tag}>"
            for text, right in zip(texts, numeric, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = f"<thead>{line('th', header)}</thead>" if header and body else ""
    lines = "".join(line("td", [text for text, _ in row]) for row in body)
    return f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>'


def _cell(value: str | int | float | None) -> tuple[str, bool]:
    """Text of a cell, and whether it may stand in a right-aligned column."""
    if value is None or value != value:
        return "-", True
    if isinstance(value, float):
        return f"{value:.4g}", True
    if isinstance(value, int):
        return str(value), True
    return value, re.fullmatch(r"[\d.]+", value) is not None


def figure(png: bytes, caption: str, alt: str) -> str:
    """A picture inside the page, which a click shows twice as large."""
    data = base64.b64encode(png).decode()
    return (
        '<figure><label class="scroll" style="display: block"><input type="checkbox">'
        f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}"></label>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def details(summary: str, text: str) -> str:
    """Preformatted text behind a fold."""
    return folded(summary, f"<pre>{escape(text)}</pre>")


def folded(summary: str, body: str) -> str:
    """HTML behind a fold."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def transcript(words: Sequence[tuple[float, str]]) -> str:
    """Words with the second of each that follows a pause."""
    parts, before = [], -PAUSE_SEC
    for seconds, word in words:
        if seconds - before >= PAUSE_SEC:
            parts.append(f"<span>{seconds:.0f} s</span>")
        parts.append(escape(word))
        before = seconds
    return f'<p class="words">{" ".join(parts)}</p>' if parts else ""


def player(path: Path, caption: str) -> str:
    """The first `AUDIO_LIMIT_SEC` of a sound file, inside the page as Ogg Vorbis."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(path) as source:
        left = int(AUDIO_LIMIT_SEC * source.samplerate)
        if source.frames > left:
            caption += f" (the first {AUDIO_LIMIT_SEC:g} s)"
        # by blocks: libsndfile's Vorbis encoder overflows its stack on minutes at once
        with soundfile.SoundFile(
            buffer, "w", source.samplerate, source.channels, "VORBIS", format="OGG"
        ) as target:
            for block in source.blocks(blocksize=source.samplerate, frames=left, dtype="float32"):
                target.write(block)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<p class="note">{escape(caption)}</p>'
        f'<audio controls preload="metadata" src="data:audio/ogg;base64,{data}"></audio>'
    )
