"""What a stopped `lit-deconv top` leaves, so that the same command goes on where it was.

Each process writes what it has counted to a file of its own. Whoever comes next merges the files;
so it makes no difference how many processes there were, or will be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.top import Collector

FOLDER = ".unfinished"
States = Mapping[str, Mapping[str, Tensor]]
"""From `Collector.states`."""


class Unfinished:
    """The folder of a run that is not finished.

    Args:
        output: The output folder.
        total: How many images there are.
    """

    def __init__(self, output: Path, total: int) -> None:
        self.folder = output / FOLDER
        self.total = total

    def begin(self, run: Mapping[str, Any]) -> int:
        """Start, or go on with what a stopped run left; for the first process alone.

        Args:
            run: What must be the same for going on to make sense.

        Returns:
            How many images were looked at before.

        Raises:
            ValueError: Another run was stopped here.
        """
        path = self.folder / "run.json"
        if path.is_file():
            other = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in run if run[key] != other.get(key)]
            if changed:
                raise ValueError(
                    f"{self.folder.parent} holds a run that was stopped, with other {', '.join(changed)}; "
                    "give the same options to go on with it, or --force to start anew"
                )
            counted, _, _ = self.load()
            return int(counted.sum())
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run), encoding="utf-8")
        return 0

    def gather(self) -> None:
        """Make one file of all that stopped runs counted; for the first process alone."""
        parts = self._parts()
        if not parts:
            return
        counted, unreadable, states = self.load()
        last = int(parts[0].parent.name)
        following = self.folder / f"{last + 1}"
        following.mkdir(exist_ok=True)
        merged = {"counted": counted, "unreadable": unreadable, "states": states}
        _saved(merged, following / "before.pt")
        shutil.rmtree(self.folder / f"{last}")

    def save(
        self, rank: int, counted: Tensor, unreadable: Mapping[int, str], states: States
    ) -> None:
        """Keep what this process has counted since it started.

        Args:
            rank: Its number.
            counted: bool [total], the images.
            unreadable: Those of them that could not be read.
            states: What a collector counted of the others.
        """
        folder = self.folder / f"{self._generation()}"
        folder.mkdir(exist_ok=True)
        part = {
            "counted": counted,
            "unreadable": dict(unreadable),
            "states": [{n: {s: t.cpu() for s, t in each.items()} for n, each in states.items()}],
        }
        _saved(part, folder / f"process-{rank}.pt")

    def load(self) -> tuple[Tensor, dict[int, str], list[States]]:
        """All that was counted: which images, those that could not be read, the states to merge."""
        counted = torch.zeros(self.total, dtype=torch.bool)
        unreadable: dict[int, str] = {}
        states: list[States] = []
        for path in self._parts():
            part = torch.load(path, map_location="cpu", weights_only=True)
            counted |= part["counted"]
            unreadable.update(part["unreadable"])
            states += part["states"]
        return counted, unreadable, [Collector.merged(states)] if states else []

    def end(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _generation(self) -> int:
        numbers = [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]
        # a newer one counts from the moment on that its first file is whole
        whole = [number for number in numbers if any((self.folder / f"{number}").glob("*.pt"))]
        return max(whole, default=0)

    def _parts(self) -> list[Path]:
        return sorted((self.folder / f"{self._generation()}").glob("*.pt"))


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights and buffers."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return found.hexdigest()[:16]


def hashed_names(names: Any) -> str:
    """A short hash of what the images are called."""
    found = hashlib.sha256()
    for number in range(len(names)):
        found.update(names[number].encode(errors="surrogateescape") + b"\0")
    return found.hexdigest()[:16]


def _saved(content: object, path: Path) -> None:
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    beside.replace(path)
