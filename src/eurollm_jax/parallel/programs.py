"""Compiled programs that outlive a process, and what compiling costs."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

log = logging.getLogger(__name__)

KEPT_BYTES = 4 << 30


def keep_programs() -> Path | None:
    """Lets JAX keep compiled programs between processes and returns their folder; None where that is turned off.

    JAX_COMPILATION_CACHE_DIR names another folder than ~/.cache/eurollm_jax/xla, JAX_ENABLE_COMPILATION_CACHE=false
    none. A program is found again by its text, JAX's version, XLA's flags and the devices (of a CPU, the instructions
    that it has): machines that differ may share a folder, and so may processes. The oldest files are removed once all
    of them exceed 4 GiB. JAX's own limit needs a lock for each look-up, which not every cluster's file system has.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(jax.config.jax_compilation_cache_dir or home / "eurollm_jax" / "xla")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning(
            "COMPILED PROGRAMS ARE NOT KEPT: %s cannot hold them (%s); JAX_COMPILATION_CACHE_DIR names another folder",
            folder,
            error.strerror,
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    remove_oldest(folder, KEPT_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def remove_oldest(folder: Path, limit: int) -> None:
    """Removes the oldest programs beyond `limit` bytes; another process may do so at the same time."""
    found = []
    for path in folder.glob("*-cache"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


@dataclass
class CompileTimes:
    """What turning functions into programs took within a block, in seconds."""

    lowering: float = 0.0  # tracing, and writing what was traced for the compiler
    compiling: float = 0.0  # the compiler's work, or the look-up of programs that were kept
    programs: int = 0
    found: int = 0  # of them, those that were kept


@contextmanager
def compile_times() -> Iterator[CompileTimes]:
    """Filled in when the block ends, which compiles and does nothing else; other threads may compile meanwhile."""
    times, thread = CompileTimes(), threading.get_ident()

    def duration(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == thread:
            times.compiling += duration_secs
            times.programs += 1

    def happened(event: str, **_: object) -> None:
        times.found += event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(happened)
    start = time.perf_counter()
    try:
        yield times
    finally:
        times.lowering = time.perf_counter() - start - times.compiling
        jax.monitoring.unregister_event_duration_listener(duration)
        jax.monitoring.unregister_event_listener(happened)
