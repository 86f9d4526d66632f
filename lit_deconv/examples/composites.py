"""A generated data set: objects built from shared parts, with a mask of each object and part."""

from __future__ import annotations

import hashlib
import math
import os
import random
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lit_deconv.examples import objects, parts
from lit_deconv.examples.parts import PARTS, SUPERSAMPLING, Canvas, Colour, Fill, Pen

Split = Literal["train", "val"]

CLASS_NAMES = tuple(objects.DRAW)


class CompositePictures(Dataset[tuple[Tensor, int]]):
    """Pictures of faces, cats, cars, houses and so on before cluttered backgrounds.

    The same seed gives the same pictures. They are drawn once and read from the cache
    afterwards. Classes come in turn, so that any run of ten pictures holds each class once.

    Args:
        split: "train" or "val"; no picture is in both.
        count: number of pictures.
        size: height and width in pixels.
        seed: another seed gives other pictures.
        cache: folder to keep the pictures in; None for the user's cache folder.
        transform: applied to each picture, float32 [3, H, W] in 0 to 1.
    """

    def __init__(
        self,
        split: Split = "train",
        count: int = 5000,
        size: int = 64,
        seed: int = 0,
        cache: str | Path | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        folder = default_cache() if cache is None else Path(cache)
        pictures, part_maps = _cached(folder, split, count, size, seed)
        self.pictures = torch.from_numpy(pictures)
        self.part_maps = torch.from_numpy(part_maps)
        self.labels = torch.arange(count) % len(CLASS_NAMES)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pictures[index].float() / 255
        label = int(self.labels[index])
        return (image if self.transform is None else self.transform(image)), label

    def object_mask(self, index: int) -> Tensor:
        """Where the object is: bool [H, W]."""
        return self.part_maps[index] > 0

    def part_masks(self, index: int) -> dict[str, Tensor]:
        """Where each visible part of the object is, by the part's name: bool [H, W] each."""
        part_map = self.part_maps[index]
        return {PARTS[i - 1]: part_map == i for i in part_map.unique().tolist() if i}


def draw_picture(
    class_name: str, rng: random.Random, size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object of a class at a random place before random clutter.

    Args:
        class_name: one of `CLASS_NAMES`.
        rng: source of every random choice.
        size: height and width in pixels.

    Returns:
        The picture, uint8 [3, H, W], and its part map, uint8 [H, W]: 0 for the
        background, else the index into `PARTS` plus one.
    """
    side = size * SUPERSAMPLING
    ground = parts.bright(rng)
    canvas = Canvas(parts.textured(rng, side, ground, _nearby(rng, ground)))
    outline = parts.grey(rng, 0, 40) if rng.random() < 0.7 else None
    for _ in range(rng.randint(5, 9)):
        place = rng.uniform(0, side), rng.uniform(0, side)
        angle, radius = rng.uniform(-math.pi, math.pi), side * rng.uniform(0.05, 0.14)
        parts.loose_part(Pen(canvas, rng, place, radius, angle, outline=outline, clutter=True))

    radius = side * rng.uniform(0.26, 0.42)
    margin = radius * 1.1
    pen = Pen(
        canvas,
        rng,
        centre=(rng.uniform(margin, side - margin), rng.uniform(margin, side - margin)),
        radius=radius,
        angle=rng.gauss(0, 0.16),
        mirror=rng.random() < 0.5,
        outline=outline,
    )
    main = _contrasting(rng, ground)
    second = _contrasting(rng, ground, main)
    surface: Fill = main
    if rng.random() < 0.4:
        surface = parts.textured(rng, side, main, _nearby(rng, main))
    objects.DRAW[class_name](pen, surface, second)

    picture, part_map = canvas.finish()
    return _with_grain(rng, picture).transpose(2, 0, 1), part_map


def draw_split(
    split: Split, count: int, size: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the pictures of a split; each depends on seed, split and index alone.

    Returns:
        Pictures, uint8 [N, 3, H, W], and part maps, uint8 [N, H, W].
    """
    pictures = np.empty((count, 3, size, size), np.uint8)
    part_maps = np.empty((count, size, size), np.uint8)
    indices = range(count)
    for i in tqdm(indices, f"drawing {split} pictures", disable=None if count > 500 else True):
        rng = random.Random(f"{seed}/{split}/{i}")
        pictures[i], part_maps[i] = draw_picture(CLASS_NAMES[i % len(CLASS_NAMES)], rng, size)
    return pictures, part_maps


def default_cache() -> Path:
    """The user's cache folder for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-deconv"


def _cached(
    folder: Path, split: Split, count: int, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    path = folder / f"composites-{_version()}-{split}-{count}-{size}px-seed{seed}.npz"
    try:
        with np.load(path) as archive:
            return archive["pictures"], archive["part_maps"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or cut short: draw it again
    pictures, part_maps = draw_split(split, count, size, seed)
    try:
        _write_atomically(path, pictures, part_maps)
    except OSError as error:
        warnings.warn(
            f"could not keep the drawn pictures in {folder} ({error}); they will be drawn again "
            "next time: give another folder as `cache`",
            stacklevel=3,
        )
    return pictures, part_maps


def _version() -> str:
    """A hash of the drawing code, so that a changed drawing is never served from the cache."""
    code = b"".join(Path(f).read_bytes() for f in (parts.__file__, objects.__file__, __file__))
    return hashlib.sha256(code).hexdigest()[:8]


def _write_atomically(path: Path, pictures: np.ndarray, part_maps: np.ndarray) -> None:
    """Several runs may draw at once: a reader sees a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, pictures=pictures, part_maps=part_maps)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _nearby(rng: random.Random, colour: Colour, spread: int = 60) -> Colour:
    r, g, b = (min(255, max(0, level + rng.randint(-spread, spread))) for level in colour)
    return r, g, b


def _contrasting(rng: random.Random, *others: Colour, distance: int = 130) -> Colour:
    """A colour that stands out from the others, or the last one tried where none is found."""
    colour = parts.bright(rng)
    for _ in range(20):
        if all(sum(abs(a - b) for a, b in zip(colour, o, strict=True)) >= distance for o in others):
            break
        colour = parts.bright(rng)
    return colour


def _with_grain(rng: random.Random, picture: np.ndarray) -> np.ndarray:
    """Add uniform noise and a random brightness."""
    noise = np.frombuffer(rng.randbytes(picture.size), np.uint8).reshape(picture.shape)
    gain = rng.uniform(0.75, 1.1)
    grainy = picture * np.float32(gain) + (noise.astype(np.float32) - 127.5) * np.float32(0.12)
    return grainy.clip(0, 255).astype(np.uint8)
