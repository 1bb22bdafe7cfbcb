"""The progress of a run on the terminal: a bar with loss, rate, MFU and time left, or lines in a file.

metrics.py says what MFU is.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from eurollm_jax.parallel.distributed import is_first

LINE_EVERY = 15.0  # seconds, where there is no terminal


class Progress:
    """Shows metric records as they come; of several processes the first one does."""

    def __init__(self, name: str, steps: int, done: int) -> None:
        console = Console(stderr=True, quiet=not is_first())
        self._live = console.is_terminal
        self._steps, self._last_line, self._began, self._done_before = steps, 0.0, time.monotonic(), done
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(name, total=steps, completed=done, figures="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """One record of kind "train"."""
        figures = (
            f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {record['mfu']:.0%} MFU"
        )
        self._bar.update(self._task, completed=record["step"], figures=figures)
        last = record["step"] == self._steps
        if not self._live and is_first() and (last or time.monotonic() - self._last_line >= LINE_EVERY):
            self._last_line = time.monotonic()
            done = record["step"] - self._done_before
            left = (self._last_line - self._began) / max(done, 1) * (self._steps - record["step"])
            print(
                f"step {record['step']}/{self._steps}  {figures}  {left / 60:.1f} min left", file=sys.stderr, flush=True
            )

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._bar.console.print(line, highlight=False)
