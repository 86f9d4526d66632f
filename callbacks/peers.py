"""The processes of a run: what each has to say reaches all, also where one of them failed."""

from __future__ import annotations

from typing import Any

import torch.distributed

from lit_deconv.top import several_processes

__all__ = ["PeerError", "Peers"]


class PeerError(RuntimeError):
    """Another process failed, so that this one cannot go on either."""


class Peers:
    """Exchanges between the processes of a run. All of them must make the same calls.

    Args:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        together = several_processes()
        self.rank, self.size = rank, size if together else 1

    def all(self, own: Any) -> list[Any]:
        """What each process has to say, in their order."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, own)
        return found

    def at_zero(self, own: Any) -> list[Any]:
        """The same, for the first process alone; the others get what is their own."""
        if self.size == 1:
            return [own]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(own, found, dst=0)
        return [own] if found is None else found
