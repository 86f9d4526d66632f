"""Times of several sides in one run, interleaved, and the tables that come of them."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass
class Times:
    """Seconds of one side, one number a repetition.

    Attributes:
        wall: By the clock.
        cpu: Of all threads of this process; other processes on the machine hardly change them.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median by the clock."""
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """Median of CPU time."""
        return statistics.median(self.cpu)

    @property
    def spread(self) -> str:
        """Distance of the fastest and slowest repetition by the clock, as a share of the median."""
        return spread(self.wall)


def spread(numbers: Sequence[float]) -> str:
    """Largest minus smallest, as a share of the median."""
    if len(numbers) == 1:
        return "once"
    return f"{(max(numbers) - min(numbers)) / statistics.median(numbers):.0%}"


# Seconds that the repetitions of one row may take; a row that takes longer is run fewer times.
BUDGET = 8.0


def fewer(budget: float = BUDGET) -> str:
    """What a table says of that."""
    return f"fewer, at least one, where they would take over {budget:.0f} s"


def interleaved(
    sides: Mapping[str, Run],
    repetitions: int,
    device: str = "cpu",
    at_least: float = 0.1,
    budget: float = BUDGET,
) -> dict[str, Times]:
    """Times every side in turn, several times over, each once beforehand to warm up.

    Args:
        sides: What to run, by name.
        repetitions: How often each, as far as ``budget`` allows.
        device: Waited for before the clock is read.
        at_least: Seconds; what is faster runs several times in each repetition.
        budget: Seconds that all repetitions may take.
    """
    if device == "cpu":
        _keep_freed_memory()
    numbers, round_seconds = {}, 0.0
    for name, run in sides.items():
        seconds = _once(run, 1, device)[0]
        if seconds < at_least:
            seconds = _once(run, 1, device)[0]
        numbers[name] = max(1, math.ceil(at_least / seconds))
        round_seconds += seconds * numbers[name]
    repetitions = max(1, min(repetitions, int(budget / round_seconds)))
    times = {name: Times() for name in sides}
    for repetition in range(repetitions):
        names = list(sides)
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            wall, cpu = _once(sides[name], numbers[name], device)
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed, on all sides.

    How much it keeps follows the largest block handed back so far, up to 32 MB; a training hands back
    larger ones. With none before, a small network's maps go back to the system and come again page by
    page, or do not, by chance: up to a quarter of a row, on either side.
    """
    torch.zeros(31 << 20, dtype=torch.uint8)


def _once(run: Run, number: int, device: str) -> tuple[float, float]:
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(number):
            run()
        _wait(device)
        return (time.perf_counter() - wall) / number, (time.process_time() - cpu) / number
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def geometric_mean(numbers: Iterable[float]) -> float:
    """The mean for ratios."""
    return statistics.geometric_mean(list(numbers))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size), by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


class Table:
    """A Markdown table; each row goes to stderr as soon as it is known.

    Args:
        columns: Headings; one that ends in ":" is aligned to the left.
    """

    def __init__(self, *columns: str) -> None:
        self.lines = [
            "| " + " | ".join(column.rstrip(":") for column in columns) + " |",
            "|" + "|".join(":--" if column.endswith(":") else "--:" for column in columns) + "|",
        ]
        print(self.lines[0], file=sys.stderr, flush=True)

    def row(self, *cells: object) -> None:
        """Adds a row."""
        self.lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(self.lines[-1], file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="fewer rows and repetitions")
    found.add_argument("--repetitions", type=int, default=None, help="of each side")
    found.add_argument(
        "--threads", type=int, default=None, help="of torch; by default its own choice"
    )
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument(
        "--tf32", action="store_true", help="on CUDA, let the others' convolutions round to TF32"
    )
    found.add_argument("--only", default="", help="rows whose name holds this")
    return found


def parsed(described: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Any:
    """The arguments, with the number of threads and the precision of CUDA set."""
    asked = described.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = asked.tf32
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.repetitions is None:
        asked.repetitions = 3 if asked.quick else 5
    return asked
