"""What failed while drawing: said once, with the layer and the cause, or raised for the strict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["EVERY_LAYER", "OWN_PROBE", "SOME_IMAGES", "Failures"]

EVERY_LAYER = "any layer"
SOME_IMAGES = "some images"
OWN_PROBE = "the images given as probe="

_MOST = 3
"""Causes that one sentence names."""


class Failures:
    """Collects failures, so that one sentence says what of a validation could not be drawn.

    Args:
        on_error: "warn" warns once per layer and once per cause; "raise" raises.
    """

    def __init__(self, on_error: Literal["warn", "raise"]) -> None:
        self.on_error = on_error
        self._new: list[tuple[str, BaseException]] = []
        self._warned: set[str] = set()

    def add(self, what: str, error: BaseException) -> None:
        """Notes a failure, to be reported later.

        Args:
            what: The layer, or what else there is no picture of.
            error: The cause.
        """
        # frames hold images: only the first failure, which may be raised from, keeps its own
        self._new.append((what, error.with_traceback(None) if self._new else error))

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Notes what is raised inside instead of raising it."""
        try:
            yield
        except Exception as error:
            self.add(what, error)

    def text(self) -> str:
        """What there is to report, in one sentence; empty where nothing is new."""
        causes: dict[str, list[str]] = {}
        for what, error in self._new:
            cause = _cause(error)
            if not {what, cause} & self._warned:
                causes.setdefault(cause, []).append(what)
        said = [f"{', '.join(dict.fromkeys(names))}: {cause}" for cause, names in causes.items()]
        more = [f"and {len(said) - _MOST} causes more"] if len(said) > _MOST else []
        return "; ".join(said[:_MOST] + more)

    def report(self, text: str | None = None) -> None:
        """Warns of, or raises, what is new; then it is no longer new.

        Args:
            text: What another process has to report; None: what this one has.

        Raises:
            RuntimeError: With on_error="raise", from the first cause.
        """
        text = self.text() if text is None else text
        first = self._new[0][1] if self._new else None
        for what, error in self._new:
            self._warned.update((what, _cause(error)))
        self._new = []
        if not text:
            return
        if self.on_error == "raise":
            self._warned = set()
            raise RuntimeError(f"DeconvCallback drew no picture of {text}") from first
        rank_zero_warn(
            f"DeconvCallback drew no picture of {text}. Training goes on, and later failures of "
            "the same are not reported; on_error='raise' stops instead."
        )

    def renew(self) -> None:
        """A new run begins: what was warned of before may be warned of again."""
        self._new, self._warned = [], set()

    def forget(self) -> None:
        """Drops what is new unreported: another exception is on its way."""
        self._new = []


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
