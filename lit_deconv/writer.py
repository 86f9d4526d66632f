"""Draws, encodes and writes pictures in a thread of its own: training does not wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from torch import Tensor

from lit_deconv.sinks import Picture, Sink, encode_png


@dataclass(frozen=True)
class Failure:
    """A picture that was not written, and why.

    Args:
        tag: The picture's or the text's tag.
        step: Its step.
        error: What was raised.
    """

    tag: str
    step: int
    error: BaseException


class Writer:
    """Writes to sinks in the background: in order, with a bounded queue, losing nothing silently.

    Nothing is raised for a picture that fails. Each call returns the failures since the last one,
    for the caller to report. What is queued is finished at `close`, and also when the interpreter
    ends without it.

    Args:
        sinks: Where to write; one that fails does not keep the others from writing.
        most_waiting: Pictures that may wait; the next one waits for room.
        patience: Seconds to wait for room, or in `close` for the end, before giving up on a sink
            that hangs.
    """

    def __init__(
        self, sinks: Sequence[Sink], most_waiting: int = 16, patience: float = 60.0
    ) -> None:
        if most_waiting < 1:
            raise ValueError(f"most_waiting must be at least 1, got {most_waiting}")
        self.sinks = list(sinks)
        self.patience = patience
        self.seconds = 0.0
        """Time spent drawing, encoding and writing so far."""
        self._room = threading.Semaphore(most_waiting)
        self._lock = threading.Lock()
        self._failures: list[Failure] = []
        self._waiting: set[Future[None]] = set()
        # its thread is no daemon: the interpreter joins it, so the last write is never cut off
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "lit-deconv-writer")

    def image(
        self, tag: str, image: Tensor | Callable[[], Tensor], step: int, caption: str = ""
    ) -> list[Failure]:
        """Queues a picture.

        Args:
            tag: Where it is shown.
            image: uint8 [3, H, W], not changed afterwards; or what draws it, called in the thread.
            step: The step of the scalars of the same moment.
            caption: Shown by loggers that know captions.

        Returns:
            The failures since the last call.
        """

        def write() -> None:
            drawn = image() if callable(image) else image
            height, width = drawn.shape[-2:]
            picture = Picture(tag, encode_png(drawn), height, width, step, caption)
            self._each(tag, step, lambda sink: sink.image(picture))

        self._queue(tag, step, write)
        return self.failures()

    def text(self, tag: str, markdown: str, step: int) -> list[Failure]:
        """Queues Markdown, such as a table.

        Returns:
            The failures since the last call.
        """
        self._queue(
            tag, step, lambda: self._each(tag, step, lambda sink: sink.text(tag, markdown, step))
        )
        return self.failures()

    def failures(self) -> list[Failure]:
        """The failures since the last call of any method."""
        with self._lock:
            taken, self._failures = self._failures, []
        return taken

    def drain(self) -> list[Failure]:
        """Waits until everything queued is written and flushed.

        Returns:
            The failures since the last call.
        """
        self._queue("flush", -1, lambda: self._each("flush", -1, lambda sink: sink.flush()))
        late = wait(list(self._waiting), timeout=self.patience).not_done
        if late:
            error = TimeoutError(f"{len(late)} pictures still unwritten after {self.patience:g} s")
            self._fail("flush", -1, error)
        return self.failures()

    def close(self) -> list[Failure]:
        """Finishes the last write and ends the thread; a second call does nothing.

        Returns:
            The failures since the last call.
        """
        if self._thread is None:
            return self.failures()
        failures = self.drain()
        self._thread.shutdown(wait=False)
        self._thread = None
        return failures

    def _queue(self, tag: str, step: int, write: Callable[[], None]) -> None:
        if self._thread is None:
            self._fail(tag, step, RuntimeError("the writer is closed; make a new one"))
        elif not self._room.acquire(timeout=self.patience):
            error = TimeoutError(f"dropped: no room in the queue for {self.patience:g} s")
            self._fail(tag, step, error)
        else:
            self._submit(self._thread, tag, step, write)

    def _submit(
        self, thread: ThreadPoolExecutor, tag: str, step: int, write: Callable[[], None]
    ) -> None:
        def run() -> None:
            start = time.perf_counter()
            try:
                write()
            except BaseException as error:
                self._fail(tag, step, error)
            finally:
                self.seconds += time.perf_counter() - start
                self._room.release()

        try:
            future = thread.submit(run)
        except RuntimeError:
            # the interpreter is ending and takes no more threads' work: write here and now
            run()
            return
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)

    def _each(self, tag: str, step: int, call: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            try:
                call(sink)
            except Exception as error:
                self._fail(tag, step, error)

    def _fail(self, tag: str, step: int, error: BaseException) -> None:
        with self._lock:
            self._failures.append(Failure(tag, step, error))
