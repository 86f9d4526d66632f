"""Values to pixels: one contrast rule for every reconstruction, and photographs as they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

GREY = 128
"""What zero looks like in a reconstruction."""

MAGENTA = (255, 0, 255)
"""What NaN and infinity look like: a colour that no contrast rule makes look natural."""

InputChannels = int | tuple[int, int, int] | Literal["tile"] | None
"""Which channels of the input are drawn: see `Look`."""


@dataclass(frozen=True)
class Look:
    """How every picture of a run is drawn, so that any two of them can be compared.

    Args:
        mean: What normalisation subtracted, one value or one per input channel; None: unknown.
        std: What normalisation divided by; None: unknown.
        percentile: Which percentile of a reconstruction's non-zero |values| is full contrast.
        input_channels: None draws 1 channel as grey, 3 as RGB, other numbers as tiles; an int draws
            that one as grey, a triple those three as RGB, "tile" all of them as grey tiles.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    percentile: float = 99.5
    input_channels: InputChannels = None

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], got {self.percentile}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"give both mean and std, or neither: {self.mean=}, {self.std=}")

    def rule(self, drawn: str = "reconstruction") -> str:
        """The contrast rule in words, for the foot of a title."""
        return (
            f"Contrast: each {drawn} has its own scale, zero is mid-grey, "
            f"clipped at percentile {self.percentile:g} of non-zero |values|."
        )

    @property
    def warning(self) -> str:
        """What must be said of the photographs; empty where there is nothing to say."""
        if self.mean is None:
            return "Normalisation unknown: inputs are stretched from min to max."
        return ""


def enhance(
    reconstruction: Tensor, percentile: float = 99.5, input_channels: InputChannels = None
) -> Tensor:
    """Draws a reconstruction with the contrast enhanced, as the paper's figures are.

    Zero is mid-grey (128); the scale is the given percentile of the non-zero |values|, one scale
    for all channels of the input, and what exceeds it is clipped. Zeros are left out of the
    percentile: a unit of an early layer reaches so few pixels that they would make the scale zero.
    Values that are not finite are magenta.

    Args:
        reconstruction: [C, h, w], any dtype, any device.
        percentile: In (0, 100].
        input_channels: See :class:`Look`.

    Returns:
        uint8 [3, h, w] on the CPU (larger where channels are tiled).
    """
    values, broken = _finite(reconstruction)
    sizes = values.abs()
    sizes = sizes[sizes > 0]
    if sizes.numel():
        rank = max(1, math.ceil(percentile / 100 * sizes.numel()))
        values = values / sizes.kthvalue(rank).values
    pixels = (GREY + 127 * values.clamp(-1, 1)).round().to(torch.uint8)
    return _paint(pixels, broken, input_channels)


def photograph(
    image: Tensor,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_channels: InputChannels = None,
) -> Tensor:
    """Draws an input image or patch as it was before normalisation.

    Args:
        image: [C, h, w]; uint8 is drawn as it is.
        mean: What normalisation subtracted; None (with std None): unknown, the image is stretched
            from its smallest to its largest value, and the figure must say so (``Look.warning``).
        std: What normalisation divided by.
        input_channels: See :class:`Look`.

    Returns:
        uint8 [3, h, w] on the CPU (larger where channels are tiled).

    Raises:
        ValueError: When mean or std has neither one value nor one per channel.
    """
    values, broken = _finite(image)
    if image.dtype == torch.uint8:
        values = values / 255
    elif mean is None or std is None:
        whole = values[~broken]
        low, high = (whole.min(), whole.max()) if whole.numel() else (0.0, 0.0)
        values = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    else:
        values = values * _per_channel(std, values, "std") + _per_channel(mean, values, "mean")
    return _paint((255 * values.clamp(0, 1)).round().to(torch.uint8), broken, input_channels)


def count_nonfinite(values: Tensor) -> int:
    """Counts NaN and infinite values: what `enhance` paints magenta and titles report."""
    return int((~torch.isfinite(values.detach())).sum())


def magnify(image: Tensor, least: int = 96, most: int = 256, smooth: bool = True) -> Tensor:
    """Scales a picture so that it can be seen, by a whole factor where one fits.

    Args:
        image: uint8 [3, h, w].
        least: The shorter side is brought to at least this, pixels kept square and sharp; where a
            whole factor would pass `most`, exactly to this.
        most: The longer side is kept to this, before `least`; a larger image is averaged down.
        smooth: Between two whole factors, pixels are interpolated, else some are doubled, which
            takes less time and room to encode.

    Returns:
        uint8 [3, h', w'].
    """
    height, width = image.shape[-2:]
    short, long = min(height, width), max(height, width)
    factor = math.ceil(least / short)
    if factor * long <= most:
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if short >= least and long <= most:
        return image
    scale = min(least / short, most / long) if short < least else most / long
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    larger = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    how = Image.Resampling.BOX if scale < 1 else larger
    return to_tensor(to_pil(image).resize(size, how))


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 picture [3, H, W] as a Pillow image."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow image as uint8 [3, H, W]."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    # a view: pictures of this size are not copied without need, and encoding turns them back
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _finite(image: Tensor) -> tuple[Tensor, Tensor]:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(
            f"expected one picture [C, h, w] with no empty side, got {list(image.shape)}"
        )
    # float64, so that neither float16's range nor the smallest float32 decides the scale
    values = image.detach().cpu().to(torch.float64)
    broken = ~torch.isfinite(values)
    return values.masked_fill(broken, 0.0), broken


def _per_channel(value: float | Sequence[float], image: Tensor, name: str) -> Tensor:
    channels = image.shape[0]
    column = torch.as_tensor(value, dtype=image.dtype).flatten()
    if column.numel() not in (1, channels):
        raise ValueError(
            f"{name} has {column.numel()} values for an image of {channels} channels; "
            f"give one, or {channels}"
        )
    return column.view(-1, 1, 1)


def _paint(pixels: Tensor, broken: Tensor, input_channels: InputChannels) -> Tensor:
    """Chooses the input channels, makes them RGB, marks what was not finite: uint8 [3, H, W]."""
    chosen = input_channels
    if chosen is None and pixels.shape[0] not in (1, 3):
        chosen = "tile"
    if chosen == "tile":
        pixels, broken = _tile(pixels, 0), _tile(broken, False)
    elif chosen is not None:
        index = [chosen] if isinstance(chosen, int) else list(chosen)
        if max(index) >= pixels.shape[0] or min(index) < 0:
            raise ValueError(
                f"input_channels={input_channels} for a picture of {pixels.shape[0]} channels; "
                f"choose among 0 to {pixels.shape[0] - 1}"
            )
        pixels, broken = pixels[index], broken[index]
    marked = broken.any(0)
    painted = pixels.expand(3, -1, -1).clone()
    for plane, value in zip(painted, MAGENTA, strict=True):
        plane[marked] = value
    return painted


def _tile(planes: Tensor, fill: int | bool) -> Tensor:
    """Lays planes [C, h, w] out as one plane [1, H, W], a line of one pixel between them."""
    count, height, width = planes.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = planes.new_full((down * (height + 1) - 1, across * (width + 1) - 1), fill)
    for index, plane in enumerate(planes):
        top, left = (index // across) * (height + 1), (index % across) * (width + 1)
        sheet[top : top + height, left : left + width] = plane
    return sheet[None]
