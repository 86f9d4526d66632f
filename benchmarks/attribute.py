"""F, the command line: `lit-deconv attribute` against a plain script with Captum, as whole processes.

    python -m benchmarks.attribute [--quick] [--threads N] [--repetitions 3]

32 pictures, 4 layers of alexnet, 16 channels each, the top 9 units: from the start of the process to
its end, importing, reading, finding, reconstructing, drawing and writing included. Ours also captions
its figures, checks each activation anew, and writes a TensorBoard log. Captum's side is run with one
unit a call and with 8 units a call. Peak memory is the process's largest resident set.
The last table compares the reconstructions themselves.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models

from benchmarks._measure import Table, number, parsed, parser

LAYERS = "features.1,features.4,features.7,features.11"
CHANNELS, K = 16, 9


def pictures(folder: Path, count: int) -> None:
    """Blurred noise at photograph size, as JPEG files."""
    noise = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        coarse = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03d}.jpg")


def whole_process(words: Sequence[str], threads: int | None) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds and peak MiB of a process."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        assert process.stderr is not None
        raise RuntimeError(f"{words} failed: {process.stderr.read().decode()[-2000:]}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def largest_error(ours: Path, captum: Path) -> tuple[int, float]:
    """Units that both chose, and the largest relative error of a reconstruction among them."""
    index = json.loads((ours / "index.json").read_text())
    count, worst = 0, 0.0
    for layer in LAYERS.split(","):
        with np.load(captum / f"{layer}.npz") as found:
            theirs = dict(
                zip(map(tuple, found["units"].tolist()), found["reconstructions"], strict=True)
            )
        for unit in index["units"]:
            sample = index["pictures"].index(unit["picture"])
            other = theirs.get((sample, unit["channel"], *unit["position"]))
            if unit["layer"] != layer or other is None:
                continue
            with np.load(ours / unit["file"]) as arrays:
                mine = arrays["reconstructions"][unit["row"]]
            top, left, bottom, right = unit["box"]
            t, le = max(top, 0), max(left, 0)
            b, r = min(bottom, other.shape[1]), min(right, other.shape[2])
            whole = np.zeros_like(other)
            whole[:, t:b, le:r] = mine[:, t - top : b - top, le - left : r - left]
            norm = np.linalg.norm(other)
            if norm:
                worst = max(worst, float(np.linalg.norm(whole - other) / norm))
            count += 1
    return count, worst


def measure(repetitions: int, threads: int | None, count: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder / "pictures", count)
        torch.save(models.alexnet().state_dict(), folder / "weights.pt")
        script = [sys.executable, "-m", "benchmarks._captum_script", str(folder / "weights.pt")]
        script += [str(folder / "pictures")]
        rest = [LAYERS, str(CHANNELS), str(K)]
        command = [sys.executable, "-m", "lit_deconv.cli", "attribute", str(folder / "pictures")]
        command += ["--model", "alexnet", "--state-dict", str(folder / "weights.pt")]
        command += ["--layers", LAYERS, "--channels", str(CHANNELS), "--top-k", str(K)]
        sides = {
            "imports alone": lambda out: [sys.executable, "-c", "import torch, torchvision"],
            "lit-deconv attribute": lambda out: [*command, "--device", "cpu", "--output", out],
            "Captum, 8 units a call": lambda out: [*script, out, *rest, "8"],
            "Captum, 1 unit a call": lambda out: [*script, out, *rest, "1"],
        }
        used: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
        for repetition in range(repetitions):
            for index, (side, words) in enumerate(sides.items()):
                used[side].append(
                    whole_process(words(str(folder / f"{index}-{repetition}")), threads)
                )
        table = Table(
            "side:", "wall, s", "CPU, s", "peak, MiB", "times ours, wall", "CPU", "memory"
        )
        medians = {
            side: [statistics.median(column) for column in zip(*found, strict=True)]
            for side, found in used.items()
        }
        ours = medians["lit-deconv attribute"]
        for side, found in medians.items():
            ratios = [number(theirs / mine) for theirs, mine in zip(found, ours, strict=True)]
            table.row(side, *map(number, found), *ratios)
        chosen, error = largest_error(folder / "1-0", folder / "2-0")
        units = len(LAYERS.split(",")) * CHANNELS * min(K, count)
        return (
            f"{table}\n\n{count} pictures, {units} units. Medians of {repetitions} interleaved runs. "
            f"{chosen} units chosen by both, largest relative error {error:.0e}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(parser(__doc__), arguments)
    repetitions = 1 if asked.quick else asked.repetitions
    print(measure(repetitions, asked.threads, 32))
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
