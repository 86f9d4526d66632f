"""Puts the generated data set on one page.

Run as `python -m lit_deconv.examples.contact_sheet OUT.png`.
"""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_deconv.examples.composites import CLASS_NAMES, CompositePictures
from lit_deconv.examples.parts import PARTS

_MARGIN, _CAPTION, _CELL = 6, 18, 96


def contact_sheet(pictures: CompositePictures, per_class: int = 3) -> Image.Image:
    """Pictures and part masks of every class.

    Args:
        pictures: the data set.
        per_class: pictures of each class, one below the other.

    Returns:
        One column per class, headed by its name: `per_class` pictures, and below each
        its part masks, one colour per kind of part, the same in all classes.
    """
    pitch = _CELL + _MARGIN
    columns = len(CLASS_NAMES)
    sheet = Image.new(
        "RGB", (columns * pitch + _MARGIN, 2 * per_class * pitch + _CAPTION + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index in range(per_class * columns):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * pitch, _CAPTION + _MARGIN + 2 * row * pitch
        if row == 0:
            draw.text((left + _CELL / 2, 15), CLASS_NAMES[column], "black", font, anchor="ms")
        picture = pictures.pictures[index].permute(1, 2, 0).numpy()
        masks = _part_colours()[pictures.part_maps[index].numpy()]
        sheet.paste(_enlarged(picture), (left, top))
        sheet.paste(_enlarged(masks), (left, top + pitch))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--per-class", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="folder for the drawn pictures")
    options = parser.parse_args(argv)
    pictures = CompositePictures(
        "train", options.per_class * len(CLASS_NAMES), seed=options.seed, cache=options.cache
    )
    sheet = contact_sheet(pictures, options.per_class)
    # 256 colours are enough to look at, and keep the file small.
    sheet.quantize(256).save(options.out, optimize=True)
    print(f"{options.out}: {sheet.width} x {sheet.height}, {options.out.stat().st_size:,} bytes")


def _part_colours() -> np.ndarray:
    """One colour per value of a part map, [parts + 1, 3]; the background is nearly black."""
    golden = 0.618034
    colours = [
        colorsys.hsv_to_rgb(i * golden % 1, 0.45 + 0.25 * (i % 3), 1.0 - 0.15 * (i % 2))
        for i in range(len(PARTS))
    ]
    return (np.array([(0.1, 0.1, 0.1), *colours]) * 255).astype(np.uint8)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
