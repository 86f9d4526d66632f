"""One HTML page with all figures: no network, opens from disk, sorts by layer and channel."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from lit_deconv.render import Look, Panel, Row, enhance, magnify, photograph, to_pil, to_tensor
from lit_deconv.render.page import VOID, beside, mosaic

SMALL_BYTES = 48 << 10
"""A picture larger than this as PNG is embedded as JPEG."""


@dataclass(frozen=True)
class Figure:
    """A picture on a card.

    Args:
        source: A `data:` URL; empty: there is no picture, and the note says why.
        alt: What it shows, for those who do not see it.
        name: The line below it.
        note: The line below that.
    """

    source: str
    alt: str
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Card:
    """What is shown of one channel, or of one picture.

    Args:
        layer: Name of the layer.
        channel: Number of the channel; None: the whole layer, or several channels.
        activation: Largest activation; None where there is no one number.
        title: The line above the figures.
        figures: One, or several side by side.
        lines: The lines below them.
        pictures: Files that they show, folded away below.
    """

    layer: str
    channel: int | None
    activation: float | None
    title: str
    figures: Sequence[Figure]
    lines: Sequence[str] = ()
    pictures: Sequence[str] = ()


def write_report(
    path: Path, about: Mapping[str, Any], layers: Sequence[str], cards: Sequence[Card]
) -> None:
    """Write the page.

    Args:
        path: The file.
        about: The index of the run.
        layers: Their order in the network.
        cards: The figures; every string in them is escaped here.
    """
    template = files("lit_deconv.commands").joinpath("report.html").read_text(encoding="utf-8")
    order = {name: number for number, name in enumerate(layers)}
    wide = [card for card in cards if len(card.figures) > 1]
    narrow = [card for card in cards if len(card.figures) == 1]
    filled = {
        "TITLE": escape(f"{about['model']}: reconstructions"),
        "ABOUT": _about(about, layers),
        "LAYERS": "".join(f'<option value="{i}">{escape(n)}</option>' for n, i in order.items()),
        "CARDS": "".join(_card(card, order) for card in narrow),
        "WIDE": "".join(_card(card, order) for card in wide),
        "WIDE_TITLE": "<h2>Side by side</h2>" if wide else "",
    }
    # one pass over the template: what was filled in is never read as a marker
    parts = template.split("{{")
    page = parts[0] + "".join(filled[p.split("}}", 1)[0]] + p.split("}}", 1)[1] for p in parts[1:])
    # a file name need not be Unicode
    path.write_text(page, encoding="utf-8", errors="replace")


def embedded(image: Tensor) -> str:
    """A picture uint8 [3, H, W] as a `data:` URL."""
    picture = to_pil(image)
    stream, kind = io.BytesIO(), "png"
    picture.save(stream, "PNG")
    if stream.tell() > SMALL_BYTES:
        stream, kind = io.BytesIO(), "jpeg"
        picture.save(stream, "JPEG", quality=88, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def panels(row: Row, look: Look) -> list[Figure]:
    """The pictures of a comparison, one figure each."""
    return [
        Figure(
            embedded(_outlined(panel, look)) if panel.image is not None else "",
            f"{panel.name}, {row.label}",
            panel.name,
            panel.note,
        )
        for panel in row.panels
    ]


def pairs(patches: Tensor, reconstructions: Tensor, look: Look) -> Tensor:
    """The square of reconstructions beside the square of their image patches, without text.

    Args:
        patches: [K, C, h, w].
        reconstructions: [K, C, h, w].
        look: How values become pixels.

    Returns:
        uint8 [3, H, W].
    """
    drawn = [enhance(each, look.percentile, look.input_channels) for each in reconstructions]
    under = [photograph(each, look.mean, look.std, look.input_channels) for each in patches]
    side = math.ceil(math.sqrt(max(1, len(drawn))))
    least = 192 if side == 1 else 96
    return to_tensor(beside([_square(group, side, least) for group in (drawn, under)]))


def _outlined(panel: Panel, look: Look) -> Tensor:
    assert panel.image is not None
    if panel.is_photograph:
        image = photograph(panel.image, look.mean, look.std, look.input_channels)
    else:
        image = enhance(panel.image, look.percentile, look.input_channels)
    large = to_pil(magnify(image, 192, 256))
    if panel.box is not None:
        scale = large.width / image.shape[-1]
        top, left, bottom, right = (round(edge * scale) for edge in panel.box)
        draw = ImageDraw.Draw(large)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255))
        draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0))
    return to_tensor(large)


def _square(pictures: Sequence[Tensor], side: int, least: int) -> Image.Image:
    if not pictures:
        return Image.new("RGB", (least, least), VOID)
    drawn = [to_pil(magnify(picture, least, 224)) for picture in pictures]
    empty = Image.new("RGB", drawn[0].size, VOID)
    rows = math.ceil(len(drawn) / side)
    return mosaic([*drawn, *[empty] * (side * rows - len(drawn))], side, gap=2)


def _about(about: Mapping[str, Any], layers: Sequence[str]) -> str:
    shown = len(about["pictures"]) - len(about["skipped"])
    size = " x ".join(map(str, about["input"]["size"]))
    facts = {
        "Model": about["model"],
        "Layers": ", ".join(layers),
        "Seed": about["seed"],
        "Pictures": f"{shown} at {size} pixels"
        + (f"; {len(about['skipped'])} unreadable left out" if about["skipped"] else ""),
        "Captum": ", ".join(about["compare"]) or "not asked",
        "Note": about["note"],
    }
    rows = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value
    )
    return f"<dl>{rows}</dl>"


def _card(card: Card, order: Mapping[str, int]) -> str:
    channel = -1 if card.channel is None else card.channel
    activation = "" if card.activation is None else f"{card.activation:.6g}"
    lines = "".join(f"<p>{escape(line)}</p>" for line in card.lines if line)
    if card.pictures:
        items = "".join(f"<li>{escape(picture)}</li>" for picture in card.pictures)
        lines += f"<details><summary>pictures, strongest first</summary><ol>{items}</ol></details>"
    return (
        f'<article data-layer="{order[card.layer]}" data-channel="{channel}" '
        f'data-activation="{activation}"><h3>{escape(card.title)}</h3>'
        f'<div class="figures">{"".join(map(_figure, card.figures))}</div>{lines}</article>\n'
    )


def _figure(figure: Figure) -> str:
    # a class's name may break where its words meet
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", escape(figure.name))
    name = f"<figcaption>{words}</figcaption>" if words else ""
    note = f"<p>{escape(figure.note)}</p>" if figure.note else ""
    picture = ""
    if figure.source:
        picture = (
            f'<button type="button"><img loading="lazy" alt="{escape(figure.alt)}" '
            f'src="{figure.source}"></button>'
        )
    return f"<figure>{picture}{name}{note}</figure>"
