"""G, the whole data set: `lit-deconv top --channels all` on every convolution of a resnet50.

    python -m benchmarks.top [--count 2000 20000] [--image-size 64] [--top-k 9] [--threads N]

Generated JPEG files, random weights. For each number of images two processes in one run: the plain
forward over the same files with the same reader, and `lit-deconv top`. Times are of the stages that
`top` notes in its index: looking at all images, reading the winners once more, drawing. Only the first
grows with the number of images; so the last rows reckon what 1.3 million would take. Peak memory is the
largest resident set of the process; disk is sampled while it runs. `--draw-seconds` stops the run
after so much drawing, and the whole of it is reckoned from the pages that were drawn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import models

from benchmarks._measure import Table, number, parsed, parser
from lit_deconv.commands.results import folder_of
from lit_deconv.commands.strongest import page_count
from lit_deconv.layers import resolve

LAYERS = "**.conv?,**.downsample.0"
"""Every convolution: 53 layers, 26,560 channels."""
IMAGENET = 1_300_000

PLAIN = """
import json, sys, time
from pathlib import Path
import torch
from torchvision import models
from lit_deconv.commands.numbered import of_files
from lit_deconv.commands.pictures import View
folder, size, batch, model = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
net = models.get_model(model).eval()
source = of_files(sorted(Path(folder).iterdir()), View((size, size), None, (0.5,), (0.25,)))
loader = source.loader(torch.arange(len(source.names)), batch, 1)
started, seen = time.perf_counter(), 0
with torch.no_grad():
    for each in loader:
        net(source.images(each.values))
        seen += len(each.numbers)
assert seen == len(source.names)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


@dataclass(frozen=True)
class Used:
    """What a process took: seconds of its stages, peak MiB, bytes on disk."""

    seconds: dict[str, float]
    peak: float
    disk: int
    said: str
    pages: int = 0


def pictures(folder: Path, count: int, size: int) -> None:
    """Blurred noise as JPEG files, all different."""
    noise = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        coarse = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:07d}.jpg")


def on_disk(folder: Path) -> int:
    """Bytes that files take; some may be gone while this looks."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):
                total += os.stat(os.path.join(root, file)).st_blocks * 512
    return total


def plain(folder: Path, asked: Any) -> Used:
    """The forward alone."""
    words = ["-c", PLAIN, str(folder), str(asked.image_size), str(asked.batch_size), asked.model]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *words], stdout=out, env=environment(asked))
        _, status, used = os.wait4(process.pid, 0)
        out.seek(0)
        if status:
            raise RuntimeError("the plain forward failed")
        return Used(json.load(out), used.ru_maxrss / 1024, 0, "")


def top(folder: Path, output: Path, asked: Any) -> Used:
    """`lit-deconv top`, stopped after so much drawing where that was asked for."""
    words = [sys.executable, "-m", "lit_deconv.cli", "top", str(folder), "--model", asked.model]
    words += ["--layers", asked.layers, "--channels", "all", "--top-k", str(asked.top_k)]
    words += ["--size", str(asked.image_size), "--mean", "0.5", "--std", "0.25", "--raw", asked.raw]
    words += ["--batch-size", str(asked.batch_size), "--workers", "1", "--device", "cpu"]
    words += ["--output", str(output)]
    pages, stop = output / ".unfinished" / "pages", asked.draw_seconds
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=err, env=environment(asked)
        )
        most, began, asked_to_stop = 0, 0.0, False
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            most = max(most, on_disk(output))
            if not began and pages.is_dir():
                began = time.monotonic()
            if stop and began and not asked_to_stop and time.monotonic() - began > stop:
                process.terminate()
                asked_to_stop = True
            time.sleep(0.5)
        err.seek(0)
        said = err.read()
    if status and not asked_to_stop:
        raise RuntimeError(f"top failed: {said[-2000:]}")
    peak, disk = used.ru_maxrss / 1024, max(most, on_disk(output))
    if not asked_to_stop:
        index = json.loads((output / "index.json").read_text())
        count = sum(len(layer["files"]) for layer in index["layers"].values())
        return Used(index["seconds"], peak, disk, said, count)
    seconds = json.loads((output / ".unfinished" / "seconds.json").read_text())
    drawing, count = reckoned(output / ".unfinished" / "pages", asked)
    return Used({**seconds, "drawing": drawing}, peak, disk, said, count)


def reckoned(pages: Path, asked: Any) -> tuple[float, int]:
    """Seconds of all pages, by the mean of each layer's that were drawn, and how many were."""
    drawn: dict[str, list[float]] = {}
    for path in pages.glob("*.json"):
        layer = path.stem.rpartition("-")[0]
        drawn.setdefault(layer, []).append(json.loads(path.read_text())["seconds"])
    total = 0.0
    counts = pages_by_layer(asked)
    for layer, count in counts.items():
        if layer not in drawn:
            raise RuntimeError(f"no page of {layer} was drawn; give more --draw-seconds")
        total += count * statistics.mean(drawn[layer])
    return total, sum(map(len, drawn.values()))


def pages_by_layer(asked: Any) -> dict[str, int]:
    """How many pages all channels of each layer make."""
    model = models.get_model(asked.model)
    known = {name: module for name, module in model.named_modules() if name}
    chosen = resolve(model, asked.layers.split(","))
    return {folder_of(name): page_count(known[name].out_channels) for name in chosen}


def environment(asked: Any) -> dict[str, str]:
    """Threads as they were asked for, in a process of its own."""
    return {**os.environ, **({"OMP_NUM_THREADS": str(asked.threads)} if asked.threads else {})}


def reckon(asked: Any, each: float, forward: float, fixed: float) -> str:
    """What 1.3 million images would take."""
    hours = (IMAGENET * each + fixed) / 3600
    return (
        f"1.3 million images of this size on this machine: {number(IMAGENET * each / 3600)} h to look, "
        f"where the plain forward takes {number(IMAGENET * forward / 3600)} h, and "
        f"{number(fixed / 3600)} h to read the winners and draw, however many images there are: "
        f"{number(hours)} h in all."
    )


def measure(asked: Any) -> str:
    """The tables."""
    table = Table(
        "images:",
        "plain forward, ms an image",
        "looking, ms an image",
        "ratio",
        "reading winners, s",
        "drawing, s",
        "pages drawn",
        "peak plain, MiB",
        "peak top, MiB",
        "disk, MiB",
    )
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for count in asked.count:
            folder, output = Path(name, f"pictures-{count}"), Path(name, f"top-{count}")
            pictures(folder, count, asked.image_size)
            alone, ours = plain(folder, asked), top(folder, output, asked)
            again = plain(folder, asked)
            forward = (alone.seconds["seconds"] + again.seconds["seconds"]) / 2 / count
            each = ours.seconds["looking"] / count
            table.row(
                count,
                number(forward * 1e3),
                number(each * 1e3),
                number(each / forward),
                number(ours.seconds["reading the winners"]),
                number(ours.seconds["drawing"]),
                ours.pages,
                number(max(alone.peak, again.peak)),
                number(ours.peak),
                number(ours.disk / 2**20),
            )
            print(ours.said.splitlines()[0], file=sys.stderr)
            fixed = ours.seconds["reading the winners"] + ours.seconds["drawing"]
            lines.append(f"From {count}: {reckon(asked, each, forward, fixed)}")
            lines.append(f"Said beforehand: {ours.said.splitlines()[0]}.")
    about = f"{asked.model}, {asked.layers}, {asked.image_size} x {asked.image_size} pixels"
    stopped = " Drawing is reckoned from the pages drawn." if asked.draw_seconds else ""
    return "\n\n".join(
        [f"{table}", f"{about}, top {asked.top_k}, raw {asked.raw}.{stopped}", *lines]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    described = parser(__doc__)
    described.add_argument("--count", type=int, nargs="+", default=[2000, 20_000])
    described.add_argument("--image-size", type=int, default=64)
    described.add_argument("--batch-size", type=int, default=32)
    described.add_argument("--top-k", type=int, default=9)
    described.add_argument("--model", default="resnet50")
    described.add_argument("--layers", default=LAYERS)
    described.add_argument("--raw", default="none")
    described.add_argument("--draw-seconds", type=float, default=None)
    print(measure(parsed(described, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
