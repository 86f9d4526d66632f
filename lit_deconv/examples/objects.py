"""The ten classes of the generated data set: how each object is put together from parts."""

from __future__ import annotations

from collections.abc import Callable

from lit_deconv.examples.parts import Fill, Pen, bright, eye, petals, triangle, wheel, window

DRAW: dict[str, Callable[[Pen, Fill, Fill], None]]
"""Draws the object of that name with its main and its second fill."""


def _face(pen: Pen, main: Fill, second: Fill) -> None:
    width = pen.rng.uniform(0.72, 0.9)
    for side in (-1, 1):
        pen.ellipse("ear", side * width, 0.05, 0.18, 0.24, main)
    pen.ellipse("head", 0, 0, width, 1.0, main)
    spread, height = pen.rng.uniform(0.28, 0.4), pen.rng.uniform(-0.35, -0.15)
    r = pen.rng.uniform(0.16, 0.22)
    eye(pen, -spread, height, r)
    eye(pen, spread, height, r)
    triangle(pen, "nose", (-0.12, 0.25), (0.12, 0.25), (0, -0.1), second)
    smile = pen.rng.uniform(-0.12, 0.25)
    pen.polygon(
        "mouth",
        [(-0.4, 0.5 - smile / 2), (0, 0.48 + smile / 2), (0.4, 0.5 - smile / 2), (0, 0.7 + smile)],
        pen.rng.choice([(200, 40, 50), (120, 20, 40), (230, 90, 100)]),
    )


def _cat(pen: Pen, main: Fill, second: Fill) -> None:
    tip = pen.rng.uniform(-1.1, -0.9)
    for side in (-1, 1):
        triangle(pen, "ear", (side * 0.88, 0.0), (side * 0.12, -0.5), (side * 0.75, tip), main)
        triangle(
            pen, "ear", (side * 0.73, -0.3), (side * 0.42, -0.5), (side * 0.69, 0.75 * tip), second
        )
    pen.ellipse("head", 0, 0.15, 0.92, 0.75, main)
    spread, r = pen.rng.uniform(0.33, 0.45), pen.rng.uniform(0.16, 0.22)
    eye(pen, -spread, 0.0, r)
    eye(pen, spread, 0.0, r)
    for side in (-1, 1):
        for rise in (-0.08, 0.14):
            pen.bar("whisker", (side * 0.3, 0.42), (side * 1.1, 0.4 + rise), 0.08, (25, 25, 30))
    triangle(pen, "nose", (-0.13, 0.27), (0.13, 0.27), (0, 0.44), second)
    pen.bar("mouth", (0, 0.5), (-0.22, 0.66), 0.1, (60, 20, 30))
    pen.bar("mouth", (0, 0.5), (0.22, 0.66), 0.1, (60, 20, 30))


def _fish(pen: Pen, main: Fill, second: Fill) -> None:
    height = pen.rng.uniform(0.42, 0.6)
    triangle(pen, "tail", (-0.35, 0), (-1.05, -0.5), (-1.05, 0.5), second)
    triangle(
        pen, "fin", (-0.35, -0.7 * height), (0.45, -0.7 * height), (-0.25, -height - 0.4), second
    )
    pen.ellipse("body", 0.15, 0, 0.8, height, main)
    triangle(pen, "fin", (0.2, 0.1), (-0.2, 0.0), (-0.2, 0.35), second)
    eye(pen, 0.58, -0.12, pen.rng.uniform(0.14, 0.2))
    pen.bar("mouth", (0.93, 0.12), (0.66, 0.2), 0.1, (70, 20, 30))


def _bird(pen: Pen, main: Fill, second: Fill) -> None:
    yellow = (240, pen.rng.randint(130, 200), 40)
    for x in (-0.25, 0.1):
        pen.bar("leg", (x, 0.4), (x + 0.05, 1.0), 0.1, yellow)
    triangle(pen, "tail", (-0.4, 0.1), (-1.1, -0.3), (-1.05, 0.2), second)
    pen.ellipse("body", -0.05, 0.2, 0.65, pen.rng.uniform(0.38, 0.48), main, -0.25)
    triangle(pen, "beak", (0.7, -0.65), (0.7, -0.35), (1.15, -0.45), yellow)
    pen.ellipse("head", 0.5, -0.48, 0.36, 0.34, main)
    eye(pen, 0.56, -0.54, pen.rng.uniform(0.13, 0.17))
    pen.ellipse("wing", -0.15, 0.15, 0.38, 0.22, second, pen.rng.uniform(0.1, 0.6))


def _car(pen: Pen, main: Fill, second: Fill) -> None:
    top = pen.rng.uniform(-0.62, -0.48)
    pen.polygon("body", [(-0.75, 0), (-0.5, top), (0.3, top), (0.65, 0)], second)
    pen.box("body", -1.05, -0.08, 1.05, 0.42, main)
    for x in (-0.32, 0.2):
        window(pen, x, top / 2 - 0.02, 0.4, -0.62 * top, False)
    pen.box("lamp", 0.88, 0.02, 1.05, 0.18, (250, 240, 160))
    r = pen.rng.uniform(0.25, 0.32)
    wheel(pen, -0.58, 0.42, r)
    wheel(pen, 0.58, 0.42, r)


def _train(pen: Pen, main: Fill, second: Fill) -> None:
    pen.box("chimney", 0.5, -0.75, 0.75, -0.1, second)
    pen.box("body", -0.25, -0.28, 1.0, 0.38, main)
    pen.box("wall", -0.95, -0.8, -0.2, 0.38, second)
    pen.box("roof", -1.05, -0.95, -0.1, -0.76, main)
    window(pen, -0.58, -0.36, 0.42, 0.42, pen.rng.random() < 0.5)
    r = pen.rng.uniform(0.22, 0.27)
    for x in (-0.66, 0.02, 0.68):
        wheel(pen, x, 0.46, r)


def _house(pen: Pen, main: Fill, second: Fill) -> None:
    eaves, ridge = pen.rng.uniform(-0.25, -0.1), pen.rng.uniform(-1.0, -0.8)
    pen.box("chimney", 0.38, ridge, 0.6, eaves, second)
    pen.box("wall", -0.75, eaves, 0.75, 0.85, main)
    triangle(pen, "roof", (-0.98, eaves), (0.98, eaves), (0, ridge), second)
    door = pen.rng.choice([-0.4, 0.0, 0.4])
    pen.box("door", door - 0.16, 0.3, door + 0.16, 0.85, bright(pen.rng))
    for x in (-0.4, 0.0, 0.4):
        if x != door:
            window(pen, x, 0.25 if door else 0.2, 0.34, 0.4, True)


def _boat(pen: Pen, main: Fill, second: Fill) -> None:
    deck, top = pen.rng.uniform(0.4, 0.5), pen.rng.uniform(-1.05, -0.9)
    pen.bar("mast", (0, top), (0, deck), 0.12, (90, 60, 40))
    triangle(pen, "sail", (0.12, top + 0.1), (0.12, deck - 0.15), (0.85, deck - 0.15), second)
    triangle(pen, "sail", (-0.12, top + 0.3), (-0.12, deck - 0.15), (-0.7, deck - 0.15), second)
    pen.polygon("hull", [(-1, deck), (1, deck), (0.65, 0.92), (-0.65, 0.92)], main)


def _tree(pen: Pen, main: Fill, second: Fill) -> None:
    pen.box("trunk", -0.15, 0.3, 0.15, 1.0, (pen.rng.randint(80, 130), 70, 45))
    if pen.rng.random() < 0.5:
        for base, width in ((0.55, 0.85), (0.1, 0.68), (-0.32, 0.5)):
            triangle(pen, "crown", (-width, base), (width, base), (0, base - 0.72), main)
        return
    for x, y, r in ((-0.42, 0.1, 0.46), (0.42, 0.1, 0.46), (0, -0.45, 0.55), (0, 0.05, 0.45)):
        pen.ellipse("crown", x, y, r, r, main)
    for x, y in ((-0.45, 0.12), (0.4, 0.05), (0.05, -0.5), (0.0, 0.1)):
        pen.ellipse("fruit", x, y, 0.13, 0.13, second)


def _flower(pen: Pen, main: Fill, second: Fill) -> None:
    green = (pen.rng.randint(20, 90), pen.rng.randint(110, 190), pen.rng.randint(20, 90))
    pen.bar("stem", (0, -0.2), (0, 1.05), 0.12, green)
    pen.ellipse("leaf", 0.3, 0.65, 0.32, 0.13, green, -0.6)
    pen.ellipse("leaf", -0.3, 0.75, 0.32, 0.13, green, 0.6)
    petals(pen, 0, -0.35, 0.72, pen.rng.choice([5, 6, 8]), main)
    pen.ellipse("centre", 0, -0.35, 0.24, 0.24, second)


DRAW = {
    "face": _face,
    "cat": _cat,
    "fish": _fish,
    "bird": _bird,
    "car": _car,
    "train": _train,
    "house": _house,
    "boat": _boat,
    "tree": _tree,
    "flower": _flower,
}
