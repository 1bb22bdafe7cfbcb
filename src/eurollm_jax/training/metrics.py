"""What a run tells about itself: lines in metrics.jsonl, curves for TensorBoard, the share of the machine's peak."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter

# Dense bf16 FLOP/s of one device as its maker states it; an MI250X shows each of its two dies as a device.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
    "MI300A": 981e12,
}


def peak_flops(dtype: str) -> float:
    """FLOP/s of all devices together at best: their maker's figure, or a measured product where none is known."""
    devices = jax.devices()
    stated = [peak for name, peak in PEAKS.items() if name in devices[0].device_kind]
    return len(devices) * stated[0] if stated and dtype == "bfloat16" else _measured_flops(dtype)


def _measured_flops(dtype: str, seconds: float = 0.3) -> float:
    """The best of several products of square matrices on one device, which on a CPU uses all cores."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
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

    def __init__(self, total: float) -> None:
        self.total = total
        self.restart()

    def restart(self) -> None:
        """Begins a lap."""
        self._start, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them that were spent waiting."""
        seconds, waited = time.perf_counter() - self._start, self._waited
        self.total += seconds
        self.restart()
        return seconds, waited


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard files, after dropping what lies beyond where a run resumes."""

    def __init__(self, run: Path, *, resume_at: int, facts: Mapping[str, Any]) -> None:
        self._path = run / "metrics.jsonl"
        if self._path.exists():
            self._drop_after(resume_at)
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.write({"kind": "restart", "step": resume_at, "time": now, **facts})
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _drop_after(self, step: int) -> None:
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if record["step"] <= step:
                kept.append(line + "\n")
        temporary = self._path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)
