"""All benchmarks, A to G, and the page of the documentation that shows them.

    python benchmarks/run.py [--quick] [--threads N] [--device cuda] [--markdown docs/benchmarks.md]

Each script runs in a process of its own, one after the other; their rows appear as they are found.
What the page holds behind its last marker is written by hand and stays as it is.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import torch

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {
    "figure2": "A, the work of figure 2",
    "maps": "B and C, feature maps and whole layers",
    "scaling": "D, how the time grows",
    "memory": "E, peak memory",
    "arithmetic": "F, operations, their rate, and what bounds each row",
    "convolutions": "G, forms of one transposed convolution",
}
_CPU_ONLY = "convolutions"  # whose forms are for CPUs
BY_HAND = "<!-- What follows is written by hand. -->"


def machine(device: str, threads: int | None) -> str:
    """The kind of machine, in words."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {threads or torch.get_num_threads()} threads"


def section(script: str, options: Sequence[str]) -> str:
    """What one script prints."""
    print(f"== {SCRIPTS[script]}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{script}", *options]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    took = time.perf_counter() - started
    shown = " ".join(["python -m", f"benchmarks.{script}", *options])
    return f"## {SCRIPTS[script]}\n\n`{shown}`, {took:.0f} s\n\n{found.stdout.strip()}\n"


def page(sections: Sequence[str], command: str, on: str) -> str:
    """The generated part of the page."""
    packages = ("torch", "torchvision", "captum")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"Made by `{command}` on {on}; Python {platform.python_version()}, {versions}. Random "
            "weights, random images. Both sides of a row run in one process, their repetitions in "
            "turn; an error is the largest over the largest value of its reconstruction, with the same "
            "switches on both sides.",
            "",
            *sections,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    described = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE", help="write the page there"
    )
    described.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    described.add_argument("--quick", action="store_true", help="fewer rows and repetitions")
    described.add_argument("--threads", type=int)
    described.add_argument("--device", default="cpu")
    described.add_argument("--tf32", action="store_true")
    asked = described.parse_args(arguments)
    options = ["--quick"] if asked.quick else []
    options += ["--threads", str(asked.threads)] if asked.threads else []
    options += ["--device", asked.device] if asked.device != "cpu" else []
    options += ["--tf32"] if asked.tf32 else []
    if asked.device != "cpu" and _CPU_ONLY in asked.scripts:
        asked.scripts.remove(_CPU_ONLY)
    sections = [section(script, options) for script in asked.scripts]
    command = " ".join(["python benchmarks/run.py", *options])
    if asked.scripts != list(SCRIPTS):
        command += f" --scripts {' '.join(asked.scripts)}"
    text = page(sections, command, machine(asked.device, asked.threads))
    print(text)
    if asked.markdown:
        old = asked.markdown.read_text() if asked.markdown.exists() else ""
        by_hand = old.partition(BY_HAND)[2]
        asked.markdown.write_text(f"{text}\n{BY_HAND}{by_hand or chr(10)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
