"""The long form of the fuzzing: ``python -m tests.fuzz --count 10000 --start 0 --jobs 2``."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

from tqdm import tqdm

from .check import Outcome, check, one_thread
from .generator import generate


def main() -> int:
    """Checks the networks, prints the table and the seed of every failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many networks")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--show", type=int, metavar="SEED", help="print one network and its outcome"
    )
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(generate(arguments.show))
        outcome = check(arguments.show, arguments.device)
        print("\n".join([f"path: {outcome.path}", *outcome.failures]))
        return int(bool(outcome.failures))
    seeds = range(arguments.start, arguments.start + arguments.count)
    outcomes = []
    for outcome in tqdm(
        _checked(seeds, arguments.jobs, arguments.device), total=len(seeds), unit="network"
    ):
        outcomes.append(outcome)
        if outcome.failures:
            tqdm.write(f"seed {outcome.seed}: {outcome.failures[0]}", file=sys.stderr)
    print(summary(outcomes))
    return int(any(outcome.failures for outcome in outcomes))


def _checked(seeds: range, jobs: int, device: str) -> Iterator[Outcome]:
    checked = partial(check, device=device)
    if jobs == 1:
        one_thread()
        yield from map(checked, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, one_thread) as pool:
        yield from pool.imap_unordered(checked, seeds, chunksize=20)


def summary(outcomes: Iterable[Outcome]) -> str:
    """A table of paths taken and largest errors, then each failure with its seed."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.seed)
    paths = Counter(outcome.path for outcome in outcomes)
    refused = Counter(path for outcome in outcomes for path in outcome.refusals)
    largest: dict[str, float] = defaultdict(float)
    compared: Counter[str] = Counter()
    for outcome in outcomes:
        for name, error in outcome.errors.items():
            largest[name] = max(largest[name], error)
            compared[name] += 1
    failing = [outcome for outcome in outcomes if outcome.failures]
    lines = [f"{'networks':<24}{len(outcomes):>8}"]
    lines += [f"{'path ' + name:<24}{count:>8}" for name, count in paths.most_common()]
    lines += [f"{'refused by ' + name:<24}{count:>8}" for name, count in refused.most_common()]
    lines += [
        f"{'failing':<24}{len(failing):>8}",
        "",
        f"{'comparison':<24}{'networks':>8}  largest",
    ]
    lines += [f"{name:<24}{compared[name]:>8}  {largest[name]:.1e}" for name in sorted(largest)]
    for outcome in failing:
        lines += [f"seed {outcome.seed}: {failure}" for failure in outcome.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
