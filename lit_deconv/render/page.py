"""Text and pictures on a page: wrapping, stacking, text large enough for a shrunken card."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

PAPER = (250, 250, 250)
INK = (20, 20, 20)
PALE_INK = (85, 85, 85)
VOID = (226, 226, 226)
GAP = 6
CARD = 350
"""The width in pixels of a card in TensorBoard's Images tab, as long as nobody clicks.

It shrinks a wider figure by leaving pixels out, which ruins letters: a figure is as wide as this, or
a whole number of times as wide with its letters enlarged so many times.
"""

TEXT = 14
"""The caption's height in a figure as wide as a card."""


def plain(text: str) -> str:
    """Text in ASCII, which the built-in font has: accents dropped, the rest replaced."""
    text = text.replace("×", "x").replace("\N{EN DASH}", "-").replace("\N{EM DASH}", "-")
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{HORIZONTAL ELLIPSIS}", "...")
    letters = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    return "".join(letters).encode("ascii", "replace").decode("ascii")


def wrap(text: str, size: int, width: int, most_lines: int | None = None) -> list[str]:
    """Breaks text into lines that fit: at spaces, else inside a name, else anywhere; never clipped.

    Args:
        text: What to write; its own line breaks are kept.
        size: Text size in pixels.
        width: The room in pixels.
        most_lines: Beyond these, text is shortened and ends in three dots.
    """
    lines: list[str] = []
    for paragraph in plain(text).split("\n"):
        line = ""
        for word in paragraph.split():
            if _length(f"{line} {word}".strip(), size) <= width:
                line = f"{line} {word}".strip()
                continue
            if line:
                lines.append(line)
            *full, line = _break_word(word, size, width)
            lines.extend(full)
        lines.append(line)
    if most_lines is not None and len(lines) > most_lines:
        lines = lines[:most_lines]
        while lines[-1] and _length(lines[-1] + "...", size) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def write(
    text: str,
    size: int,
    width: int,
    *,
    ink: tuple[int, int, int] = INK,
    centred: bool = False,
    most_lines: int | None = None,
    paper: tuple[int, int, int] = PAPER,
    scale: int = 1,
) -> Image.Image:
    """A picture of text, `width` pixels wide and as tall as it needs; no text is no height.

    Args:
        text: What to write.
        size: Text size in pixels.
        width: The room in pixels.
        ink: Colour of the letters.
        centred: Each line stands in the middle.
        most_lines: See `wrap`.
        paper: Colour behind them.
        scale: Written this much smaller, then enlarged by whole pixels.
    """
    if scale > 1:
        small = write(
            text,
            size // scale,
            width // scale,
            ink=ink,
            centred=centred,
            most_lines=most_lines,
            paper=paper,
        )
        sheet = Image.new("RGB", (width, small.height * scale), paper)
        enlarged = (small.width * scale, small.height * scale)
        if small.height:
            sheet.paste(small.resize(enlarged, Image.Resampling.NEAREST))
        return sheet
    lines = wrap(text, size, width, most_lines) if text else []
    step = round(size * 1.25)
    sheet = Image.new("RGB", (width, step * len(lines)), paper)
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        x = (width - _length(line, size)) / 2 if centred else 0
        draw.text((max(0, int(x)), row * step), line, fill=ink, font=_font(size))
    return sheet


def beside(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Pictures in a row, aligned at the top."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def above(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Pictures in a column, aligned on the left; empty ones take no room."""
    shown = [p for p in pictures if p.height]
    height = sum(p.height for p in shown) + gap * (len(shown) - 1)
    sheet = Image.new("RGB", (max(p.width for p in shown), height), PAPER)
    y = 0
    for picture in shown:
        sheet.paste(picture, (0, y))
        y += picture.height + gap
    return sheet


def mosaic(
    pictures: Sequence[Image.Image], across: int, gap: int = GAP, below: int | None = None
) -> Image.Image:
    """Pictures in rows of `across`; `below` is the gap between rows, where it is another."""
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    return above([beside(row, gap) for row in rows], gap if below is None else below)


def framed(picture: Image.Image, margin: int = 2 * GAP, least: int = 0) -> Image.Image:
    """A picture on paper with a margin, the whole at least `least` pixels wide."""
    size = (max(least, picture.width + 2 * margin), picture.height + 2 * margin)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(picture, (margin, margin))
    return sheet


def centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A picture in the middle of a pale cell of the given size."""
    if picture.size == (width, height):
        return picture
    sheet = Image.new("RGB", (width, height), VOID)
    sheet.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _length(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _break_word(word: str, size: int, width: int) -> list[str]:
    """Breaks a word too long for a line, where a name's parts meet if that helps."""
    parts = re.findall(r"[A-Z]+[a-z]*|[^A-Z._/-]+[._/-]*|[._/-]+", word)
    lines, line = [], ""
    for part in parts:
        if line and _length(line + part, size) > width:
            lines.append(line)
            line = ""
        line += part
        while len(line) > 1 and _length(line, size) > width:
            keep = next(
                n for n in range(len(line) - 1, 0, -1) if n == 1 or _length(line[:n], size) <= width
            )
            lines.append(line[:keep])
            line = line[keep:]
    return [*lines, line]
