"""Makes the pictures of these documents from the log of a demo run.

Run as ``lit-deconv demo`` and then ``python docs/make_pictures.py logs/demo/version_0``.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_deconv.render.page import CARD, PAPER, beside

SHOWN = {
    "demo-layers.png": ("features.relu1/grid", "features.relu2/grid", "features.relu5/grid"),
    "demo-beside-captum.png": ("features.relu2/beside_captum", "features.relu5/beside_captum"),
}
"""Files to write, and the cards of the last epoch that stand side by side in them."""

TALLEST = 1010
"""Cards go on below; so much is enough to see what they show."""


def main() -> None:
    """Write every picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("log_folder", type=Path)
    log = EventAccumulator(str(parser.parse_args().log_folder), size_guidance={"images": 0})
    log.Reload()
    for name, tags in SHOWN.items():
        last = [log.Images(f"deconv/{tag}")[-1] for tag in tags]
        picture = beside([cut(decoded(card.encoded_image_string)) for card in last])
        path = Path(__file__).parent / name
        # 256 colours are enough to look at, and keep the file small.
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{name}: step {last[0].step}, {picture.size}, {path.stat().st_size:,} bytes")


def decoded(png: bytes) -> Image.Image:
    """A card as TensorBoard shows it without a click: shrunk by leaving pixels out."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    height = round(picture.height * CARD / picture.width)
    return picture.resize((CARD, height), Image.Resampling.NEAREST)


def cut(card: Image.Image) -> Image.Image:
    """The card down to the last gap between blocks that leaves it no taller than `TALLEST`."""
    bottom = min(card.height, TALLEST)
    while bottom > 1 and not is_gap(card, bottom):
        bottom -= 1
    return card.crop((0, 0, card.width, bottom))


def is_gap(card: Image.Image, bottom: int) -> bool:
    """Whether the ten lines above `bottom` are paper."""
    return card.crop((0, bottom - 10, card.width, bottom)).getcolors() == [(10 * card.width, PAPER)]


if __name__ == "__main__":
    main()
