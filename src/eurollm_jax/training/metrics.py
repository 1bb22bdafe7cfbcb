"""What a run tells about itself: lines in metrics.jsonl, curves for TensorBoard, the share of the machine's peak."""

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from eurollm_jax.parallel.distributed import is_first
from eurollm_jax.parallel.hardware import chip_of

log = logging.getLogger(__name__)

MFU = "mfu = useful tokens/s * flops_per_token / peak_flops"
"""Model-FLOP utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

Useful tokens are those that are predicted: padding counts nothing. `flops_per_token` are those of `flops_per_token` in
model/transformer.py: forward and backward, causal attention at half of the row, nothing for what is computed again. The
time is that of training: without compilation, evaluation and saving.
"""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together at best, and where the figure is from."""

    flops: float
    source: str


def peak_of(dtype: str, device_kind: str, devices: int) -> Peak:
    """Their maker's figure, or a measured product where none is known."""
    chip = chip_of(device_kind)
    if chip is not None and chip.bfloat16 is not None and dtype == "bfloat16":
        return Peak(devices * chip.bfloat16, f"its maker's figure, {chip.bfloat16 / 1e12:g} TFLOP/s for each device")
    size = 1024 if jax.default_backend() == "cpu" else 8192
    return Peak(_measured_flops(dtype, size), f"the fastest {dtype} product of {size} x {size} matrices at the start")


def _measured_flops(dtype: str, size: int, seconds: float = 0.3) -> float:
    """The best of several products of square matrices on one device, which on a CPU uses all cores."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return devices * 2 * size**3 / best


class Clock:
    """Seconds of training, apart from what is done between steps, and of waiting for data."""

    def __init__(self, total: float, lap: tuple[float, float] = (0.0, 0.0)) -> None:
        """`lap` is `so_far` of a clock that this one goes on from."""
        self.total = total
        self._before = lap
        self.restart()

    def restart(self) -> None:
        """Begins, or goes on with, a lap."""
        self._start, self._waited = time.perf_counter() - self._before[0], self._before[1]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @contextmanager
    def waiting(self, running: jax.Array) -> Iterator[None]:
        """Around the wait for a batch; it counts unless the step that gives `running` is under way to its end."""
        start = time.perf_counter()
        yield
        if running.is_ready():  # type: ignore[attr-defined]
            self._waited += time.perf_counter() - start

    def so_far(self) -> tuple[float, float]:
        """Seconds of this lap, and those of them that were spent waiting."""
        return time.perf_counter() - self._start, self._waited

    def lap(self) -> tuple[float, float]:
        """Ends the lap and begins the next; its seconds, and those of them that were spent waiting."""
        seconds, waited = self.so_far()
        self.total += seconds
        self._before = (0.0, 0.0)
        self.restart()
        return seconds, waited


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard files, after dropping what lies beyond where a run resumes.

    Where several processes train, the first one writes and the others do nothing. Lines that the system refuses, as on
    a full disk, are kept and written later; curves are lost.
    """

    def __init__(self, run: Path, *, resume_at: int, facts: Mapping[str, Any], recorded: int | None = None) -> None:
        """`recorded` is the last step that is in a record of kind "train"; later ones are told of again."""
        self._run, self._path, self._resume_at = run, run / "metrics.jsonl", resume_at
        self._writes = is_first()
        self._unwritten: list[bytes] = []
        kind = "start"
        if self._writes and self._path.exists():
            self._drop_after(resume_at, resume_at if recorded is None else recorded)
            kind = "restart"
        self.write({"kind": kind, "step": resume_at, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._write_out()
        if "_board" in self.__dict__ and self._board is not None and _lives(self._board):
            self._board.close()

    @cached_property
    def _board(self) -> Any:
        """Opened at the first curve."""
        return _summary_writer()(str(self._run / "tensorboard"), purge_step=self._resume_at + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writes:
            self._unwritten.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._write_out()

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes or self._board is None:
            return
        if not _lives(self._board):  # or it would wait for its thread, which an error has ended
            log.warning("TENSORBOARD'S CURVES END HERE: their file could not be written; metrics.jsonl has all figures")
            self._board = None
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def secure(self) -> bool:
        """Puts on disk what is recorded, so that no checkpoint outlives the records before it; False: it could not."""
        if self._writes and self._write_out():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return not self._unwritten

    def _write_out(self) -> bool:
        """Whole lines or nothing."""
        if not self._unwritten:
            return True
        lines = b"".join(self._unwritten)
        try:
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if file.write(lines) != len(lines):
                    os.ftruncate(file.fileno(), before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if len(self._unwritten) == 1:
                log.error("%s CANNOT BE WRITTEN (%s): lines are kept until it can", self._path, error.strerror)
            return False
        self._unwritten = []
        return True

    def _drop_after(self, step: int, recorded: int) -> None:
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if record["step"] <= (recorded if record["kind"] == "skipped" else step):
                kept.append(line + "\n")
        temporary = self._path.with_name(".metrics.jsonl.tmp")
        with temporary.open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def _summary_writer() -> Any:
    """TensorBoard's writer. Its package would import torch wherever that is installed, for tensors that never come: it
    must not find it, for that would hold the first curve up for seconds."""
    hidden = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden is None:
            del sys.modules["torch"]
    return SummaryWriter


def _lives(board: Any) -> bool:
    """Whether the thread that writes curves does: an error ends it, and then its queue takes all and gives nothing."""
    worker: threading.Thread = board.file_writer.event_writer._worker
    return worker.is_alive()
