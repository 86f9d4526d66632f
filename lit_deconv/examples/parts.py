"""The parts that objects share, on a canvas that keeps which pixel belongs to which part."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Fill = Colour | Image.Image
Point = tuple[float, float]

PARTS = (
    *("head", "ear", "eye", "nose", "mouth", "whisker", "beak"),
    *("body", "fin", "tail", "wing", "leg"),
    *("window", "wheel", "chimney", "wall", "roof", "door", "lamp"),
    *("hull", "mast", "sail"),
    *("trunk", "crown", "fruit", "stem", "leaf", "petal", "centre"),
)
"""Names of the parts; a part map holds the index plus one, 0 is the background."""

SUPERSAMPLING = 2
_CIRCLE = tuple((math.cos(2 * math.pi * i / 20), math.sin(2 * math.pi * i / 20)) for i in range(20))


class Canvas:
    """A picture and its part map, drawn at twice the size and reduced when finished.

    Args:
        background: the picture to draw on, square.
    """

    def __init__(self, background: Image.Image) -> None:
        self.picture = background
        self.part_map = Image.new("L", background.size)
        self._picture_draw = ImageDraw.Draw(self.picture)
        self._part_draw = ImageDraw.Draw(self.part_map)

    def fill(
        self, part: str | None, corners: Sequence[Point], fill: Fill, outline: Colour | None
    ) -> None:
        """Fill a polygon given in pixels; with `part` None it is clutter and the part map stays."""
        if isinstance(fill, Image.Image):
            stencil = Image.new("L", self.picture.size)
            ImageDraw.Draw(stencil).polygon(corners, fill=255)
            self.picture.paste(fill, (0, 0), stencil)
            if outline is not None:
                self._picture_draw.polygon(corners, outline=outline, width=2)
        else:
            self._picture_draw.polygon(corners, fill=fill, outline=outline, width=2)
        if part is not None:
            self._part_draw.polygon(corners, fill=PARTS.index(part) + 1)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Reduce to the final size.

        Returns:
            The picture, uint8 [H, W, 3], and its part map, uint8 [H, W].
        """
        picture = np.asarray(self.picture.reduce(SUPERSAMPLING))
        # A part map is not averaged: each pixel belongs to one part.
        return picture, np.asarray(self.part_map)[::SUPERSAMPLING, ::SUPERSAMPLING]


class Pen:
    """Draws on a canvas in the coordinates of an object, which reaches from about -1 to 1.

    Args:
        canvas: where to draw.
        rng: source of every random choice.
        centre: the object's centre in pixels of the canvas.
        radius: pixels of the canvas per unit.
        angle: rotation in radians.
        mirror: draw left for right.
        outline: colour of the contours, None for none.
        clutter: draw into the background, leaving the part map as it is.
    """

    def __init__(
        self,
        canvas: Canvas,
        rng: random.Random,
        centre: Point,
        radius: float,
        angle: float = 0.0,
        mirror: bool = False,
        outline: Colour | None = None,
        clutter: bool = False,
    ) -> None:
        self.canvas = canvas
        self.rng = rng
        self.outline = outline
        self.clutter = clutter
        self._centre = centre
        self._row = radius * math.cos(angle), radius * math.sin(angle)
        self._flip = -1.0 if mirror else 1.0

    def polygon(self, part: str, corners: Sequence[Point], fill: Fill) -> None:
        """Fill a polygon."""
        (tx, ty), (cos, sin), flip = self._centre, self._row, self._flip
        pixels = [
            (tx + flip * x * cos - y * sin, ty + flip * x * sin + y * cos) for x, y in corners
        ]
        self.canvas.fill(None if self.clutter else part, pixels, fill, self.outline)

    def ellipse(
        self, part: str, x: float, y: float, rx: float, ry: float, fill: Fill, tilt: float = 0.0
    ) -> None:
        """Fill an ellipse around (x, y), tilted by `tilt` radians."""
        c, s = math.cos(tilt), math.sin(tilt)
        self.polygon(
            part,
            [(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in _CIRCLE],
            fill,
        )

    def box(
        self, part: str, left: float, top: float, right: float, bottom: float, fill: Fill
    ) -> None:
        """Fill a rectangle."""
        self.polygon(part, [(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def bar(self, part: str, start: Point, end: Point, width: float, fill: Fill) -> None:
        """Fill a thick line."""
        (x0, y0), (x1, y1) = start, end
        scale = width / 2 / math.hypot(x1 - x0, y1 - y0)
        dx, dy = -(y1 - y0) * scale, (x1 - x0) * scale
        self.polygon(
            part,
            [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)],
            fill,
        )


def eye(pen: Pen, x: float, y: float, r: float) -> None:
    """White, iris and pupil: of a face, a cat, a fish, a bird."""
    pen.ellipse("eye", x, y, r, r, (245, 245, 240))
    pen.ellipse("eye", x, y, 0.6 * r, 0.6 * r, bright(pen.rng))
    pen.ellipse("eye", x, y, 0.35 * r, 0.35 * r, (15, 15, 20))


def wheel(pen: Pen, x: float, y: float, r: float) -> None:
    """Tyre and hub: of a car, a train."""
    pen.ellipse("wheel", x, y, r, r, grey(pen.rng, 15, 70))
    pen.ellipse("wheel", x, y, 0.55 * r, 0.55 * r, grey(pen.rng, 140, 220))
    pen.ellipse("wheel", x, y, 0.2 * r, 0.2 * r, grey(pen.rng, 30, 90))


def window(pen: Pen, x: float, y: float, w: float, h: float, bars: bool) -> None:
    """Pane, with glazing bars or without: of a house, a car, a train."""
    pane = pen.rng.choice([(190, 225, 245), (250, 235, 150), (60, 75, 110)])
    pen.box("window", x - w / 2, y - h / 2, x + w / 2, y + h / 2, pane)
    if bars:
        bar = (240, 240, 235) if sum(pane) < 450 else (80, 65, 60)
        pen.box("window", x - 0.07 * w, y - h / 2, x + 0.07 * w, y + h / 2, bar)
        pen.box("window", x - w / 2, y - 0.07 * h, x + w / 2, y + 0.07 * h, bar)


def triangle(pen: Pen, part: str, a: Point, b: Point, c: Point, fill: Fill) -> None:
    """A triangle: roof, ear, sail, fin, tail, beak, fir."""
    pen.polygon(part, [a, b, c], fill)


def petals(pen: Pen, x: float, y: float, r: float, count: int, fill: Fill) -> None:
    """A ring of petals around a centre."""
    turn = pen.rng.uniform(0, math.pi)
    for i in range(count):
        angle = turn + 2 * math.pi * i / count
        pen.ellipse(
            "petal",
            x + 0.62 * r * math.cos(angle),
            y + 0.62 * r * math.sin(angle),
            0.42 * r,
            0.26 * r if count > 6 else 0.32 * r,
            fill,
            angle,
        )


def loose_part(pen: Pen) -> None:
    """One part that belongs to no object, for the clutter in the background."""
    rng = pen.rng
    fill = bright(rng)
    match rng.randrange(9):
        case 0:
            eye(pen, 0, 0, 0.5)
        case 1:
            wheel(pen, 0, 0, 0.9)
        case 2:
            window(pen, 0, 0, 1.3, rng.uniform(0.9, 1.4), rng.random() < 0.6)
        case 3 | 4:
            top = (rng.uniform(-0.9, 0.9), -rng.uniform(0.5, 1.1))
            triangle(pen, "roof", (-1, 0.6), (1, 0.6), top, fill)
        case 5:
            petals(pen, 0, 0, 1.0, rng.choice([3, 4]), fill)
        case 6:
            pen.ellipse("body", 0, 0, 1.1, rng.uniform(0.5, 1.1), fill)
        case 7:
            pen.box("wall", -1, -0.6, 1, rng.uniform(0.1, 0.8), fill)
        case _:
            pen.bar("stem", (0, -1), (rng.uniform(-0.4, 0.4), 1), 0.25, fill)


def bright(rng: random.Random) -> Colour:
    """Any colour that is not close to black."""
    r, g, b = rng.choices(range(256), k=3)
    lift = max(0, 110 - max(r, g, b))
    return r + lift, g + lift, b + lift


def grey(rng: random.Random, low: int, high: int) -> Colour:
    """A grey between two levels."""
    level = rng.randint(low, high)
    return level, level, level


def textured(rng: random.Random, side: int, first: Colour, second: Colour) -> Image.Image:
    """Stripes, checks, dots or a cloud in two colours, as a picture of side `side`."""
    stencil = rng.choice(_texture_stencils(side))
    return Image.composite(
        Image.new("RGB", stencil.size, first), Image.new("RGB", stencil.size, second), stencil
    )


@lru_cache(maxsize=4)
def _texture_stencils(side: int, count: int = 96) -> list[Image.Image]:
    """Masks to blend two colours by; drawn once, as sines are too slow to draw per picture."""
    rng = random.Random("textures")
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    stencils = []
    for i in range(count):
        angle, pitch, phase = rng.uniform(0, math.pi), rng.uniform(25, 80), rng.uniform(0, 6)
        u = np.sin((x * math.cos(angle) + y * math.sin(angle)) * pitch + phase)
        v = np.sin((y * math.cos(angle) - x * math.sin(angle)) * pitch + phase)
        if i % 4 == 3:
            cells = rng.randint(3, 9)
            cloud = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
            stencils.append(cloud.resize((side, side), Image.Resampling.BICUBIC))
            continue
        shape = (u > 0, u * v > 0, u + v > 1)[i % 4]
        stencils.append(Image.fromarray(np.where(shape, 255, 0).astype(np.uint8)))
    return stencils
