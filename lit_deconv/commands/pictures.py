"""Pictures from files, folders and globs to the tensors a model takes; what is unreadable is skipped."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jfif")
)
"""What is taken for a picture in a folder; a file that is named itself may end as it likes."""

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a broken picture raises."""

KEPT_BYTES = 256 << 20
"""Pictures are kept in memory up to this; the rest is read from its files again."""

LARGEST_UNASKED = 224
"""Pictures of an unknown model are not made larger than this, unless --size says so."""

NORMALISATION_UNKNOWN = (
    "Normalisation unknown: the model was given values from 0 to 1 (--mean, --std, --datamodule)."
)


@dataclass(frozen=True)
class View:
    """How a picture becomes the model's input.

    Args:
        size: H and W.
        resize: The shorter side is brought to this before the middle is cut out; None: so that the
            cut is as large as it can be.
        mean: Subtracted, one value per channel.
        std: Divided by.
        channels: 3 for RGB, 1 for grey.
        interpolation: Pillow's name for it.
        note: What figures must say of it.
    """

    size: tuple[int, int]
    resize: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: int = 3
    interpolation: str = "bilinear"
    note: str = ""

    def described(self) -> dict[str, Any]:
        """What the index says of it."""
        return {
            "size": list(self.size),
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
        }

    def tensor(self, picture: Image.Image) -> Tensor:
        """A picture as float32 [C, H, W], normalised."""
        return self.normalised(self.pixels(picture)).contiguous()

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture as uint8 [C, H, W], turned as its camera was, and cut to size."""
        picture = ImageOps.exif_transpose(picture)
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        method = Image.Resampling[self.interpolation.upper()]
        height, width = self.size
        if self.resize is None:
            picture = ImageOps.fit(picture, (width, height), method)
        else:
            picture = _middle(_shorter_side(picture, self.resize, method), height, width)
        values = torch.from_numpy(np.array(picture)).reshape(height, width, self.channels)
        return values.permute(2, 0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [..., C, H, W] as the float32 that the model takes."""
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        values = pixels.to(torch.float32) / 255
        return (values - mean.to(pixels.device)) / std.to(pixels.device)


@dataclass
class Pictures:
    """Readable pictures, by number; those that cannot be read are named once and left out.

    Args:
        paths: Files.
        view: How they become inputs.
        room: Bytes of pictures that may still be kept in memory.
        skipped: Why a file was left out, by file.
    """

    paths: Sequence[Path]
    view: View
    room: int = KEPT_BYTES
    skipped: dict[str, str] = field(default_factory=dict)
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of pictures, and them as [N, C, H, W]; the next batch is read meanwhile."""
        # Decoding lets go of the interpreter's lock, so threads do: no processes to start.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            starts = range(0, len(self.paths), size)
            ahead = [pool.submit(self.read, i) for i in range(min(size, len(self.paths)))]
            for start in starts:
                reading, stop = ahead, min(start + 2 * size, len(self.paths))
                ahead = [pool.submit(self.read, i) for i in range(start + size, stop)]
                read = [(start + i, future.result()) for i, future in enumerate(reading)]
                found = {number: tensor for number, tensor in read if tensor is not None}
                self._keep(found)
                if found:
                    yield list(found), torch.stack(list(found.values()))

    def read(self, number: int) -> Tensor | None:
        """One picture [C, H, W], None where it cannot be read."""
        if number in self._kept:
            return self._kept[number]
        path = self.paths[number]
        try:
            with Image.open(path) as picture:
                tensor = self.view.tensor(picture)
        except UNREADABLE as error:
            if str(path) not in self.skipped:
                self.skipped[str(path)] = str(error)
                print(f"skipped {path}: {error}", file=sys.stderr)
            return None
        return tensor

    def _keep(self, read: Mapping[int, Tensor]) -> None:
        """Keep pictures as long as there is room: the first of all, whichever thread was faster."""
        for number, tensor in read.items():
            if number not in self._kept and tensor.nbytes <= self.room:
                self.room -= tensor.nbytes
                self._kept[number] = tensor

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Pictures [M, C, H, W] once more.

        Raises:
            OSError: One that could be read before cannot be now.
        """
        read = [self.read(number) for number in numbers]
        gone = [n for n, tensor in zip(numbers, read, strict=True) if tensor is None]
        if gone:
            raise OSError(f"{self.paths[gone[0]]} cannot be read any more; start again without it")
        found = {n: tensor for n, tensor in zip(numbers, read, strict=True) if tensor is not None}
        self._keep(found)
        return torch.stack([found[number] for number in numbers])


def find_pictures(wanted: Sequence[str]) -> list[Path]:
    """The files that a user named.

    Args:
        wanted: Files, folders (all pictures below) and globs (`**` crosses folders).

    Returns:
        Files in the order given, those of a folder or glob sorted; none twice.

    Raises:
        FileNotFoundError: One of them names nothing.
    """
    found: dict[Path, None] = {}
    for entry in wanted:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_picture(p))
            if not inside:
                raise FileNotFoundError(
                    f"there is no picture in {entry} (looked for {', '.join(sorted(SUFFIXES))})"
                )
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            inside = [p for p in inside if p.is_file()]
            if not inside:
                what = "nothing matches" if glob.has_magic(entry) else "there is no file or folder"
                raise FileNotFoundError(f"{what} {entry}")
        found.update(dict.fromkeys(inside))
    return list(found)


def view_of(
    options: Namespace,
    presets: Mapping[str, Any],
    channels: int,
    paths: Sequence[Path],
    any_channels: bool = False,
) -> View:
    """How pictures become inputs: as the options say, else the model's source, else the first picture.

    Args:
        options: Those of `options.add_picture_arguments`.
        presets: What the model's source says.
        channels: What the model takes.
        paths: The pictures.
        any_channels: Whether the model may take others than 1 or 3, as no pictures are read.

    Raises:
        ValueError: A size or a normalisation that cannot be.
    """
    if channels not in (1, 3) and not any_channels:
        raise ValueError(
            f"the model takes {channels} input channels; pictures from files have 3 or 1: use the "
            "Python API for others"
        )
    size, resize = parsed_size(options.size), None
    if size is None and "size" in presets:
        side = int(presets["size"])
        size, resize = (side, side), presets.get("resize")
    if size is None:
        size = _first_size(paths)
        print(
            f"size: {size[0]} x {size[1]}, after the first picture (--size sets it)",
            file=sys.stderr,
        )
    if (options.mean is None) != (options.std is None):
        raise ValueError("give both --mean and --std, or neither")
    note = ""
    if options.mean is not None:
        mean, std = _numbers("--mean", options.mean), _numbers("--std", options.std)
    elif "mean" in presets:
        mean, std = _tuple(presets["mean"]), _tuple(presets["std"])
    else:
        mean, std, note = (0.0,), (1.0,), NORMALISATION_UNKNOWN
    for name, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} values for {channels} channels; give one or {channels}"
            )
    if min(std) <= 0:
        raise ValueError(f"--std {options.std}: expected positive numbers")
    method = presets.get("interpolation", "bilinear")
    return View(size, resize, mean, std, channels, method, note)


def _is_picture(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def parsed_size(text: str | None) -> tuple[int, int] | None:
    """What `--size` says, H and W; None where nothing was said.

    Raises:
        ValueError: It is no size.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size {text!r}: expected pixels such as 224, or HxW such as 240x320")
    return int(parts[0]), int(parts[-1])


def _first_size(paths: Sequence[Path]) -> tuple[int, int]:
    for path in paths:
        try:
            with Image.open(path) as picture:
                side = min(*ImageOps.exif_transpose(picture).size, LARGEST_UNASKED)
                return side, side
        except UNREADABLE:
            continue  # named when it is read
    return LARGEST_UNASKED, LARGEST_UNASKED


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: expected numbers such as 0.5 or 0.485,0.456,0.406"
        ) from None


def _tuple(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, (int, float)) else tuple(map(float, value))


def _shorter_side(picture: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """As torchvision's Resize does it."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(side * long / short)
    return picture.resize((side, other) if width <= height else (other, side), method)


def _middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    """As torchvision's CenterCrop does it; black where the picture is too small."""
    left, top = round((picture.width - width) / 2.0), round((picture.height - height) / 2.0)
    return picture.crop((left, top, left + width, top + height))
