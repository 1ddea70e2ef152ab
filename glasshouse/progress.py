"""Progress on stderr: items, rate, time left and a live note (such as the loss). Silent where stderr is no terminal and not asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Progress:
    """A progress bar over a known number of items.

    >>> with Progress("train", total=2, show=False) as bar:
    ...     bar.step(1, note="loss 2.1")
    >>> bar.done
    1
    """

    def __init__(self, label: str, total: int, *, unit: str = "step", show: bool | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.note = ""
        wanted = os.environ.get("GLASSHOUSE_PROGRESS")
        if show is None:
            show = sys.stderr.isatty() if wanted is None else wanted != "0"
        self.show = show
        self.live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._base = 0
        self._shown_at = 0.0

    def resume_at(self, done: int) -> None:
        """Count `done` items as finished before this run, so that the rate is this run's own."""
        self.done = self._base = done

    def step(self, count: int = 1, note: str = "") -> None:
        """`count` items are done; `note` stands at the end of the line."""
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if self.show and (now - self._shown_at > (0.2 if self.live else 10.0) or self.done >= self.total):
            self._shown_at = now
            self._print()

    def line(self) -> str:
        """The bar as text."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._base) / seconds
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        share = self.done / self.total if self.total else 1.0
        bar = "█" * int(20 * share) + "░" * (20 - int(20 * share))
        speed = f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/{self.unit}"
        return f"{self.label} {bar} {self.done}/{self.total} {speed}, {left:.0f} s left  {self.note}"

    def _print(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K" + self.line())
        else:
            sys.stderr.write(self.line() + "\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.show and self.live:
            sys.stderr.write("\r\x1b[K")
            if error is None:
                sys.stderr.write(f"{self.label}: {self.done} {self.unit}s in {time.monotonic() - self._start:.1f} s  {self.note}\n")
            sys.stderr.flush()


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds spent inside the block, as the only item of the list, after the block."""
    taken: list[float] = []
    start = time.perf_counter()
    try:
        yield taken
    finally:
        taken.append(time.perf_counter() - start)
