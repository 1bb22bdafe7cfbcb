"""What a run directory tells about its starts and ends: history.jsonl, which nothing is ever dropped from, and logs."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import jax

from eurollm_jax.parallel.distributed import is_first

LOG_BYTES, LOG_FILES = 10 << 20, 5


def note(run: Path, event: str, **facts: Any) -> None:
    """Appends a line to the run's history.jsonl; the first process alone does so."""
    if is_first():
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        with (run / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def logged(run: Path) -> Iterator[None]:
    """What the library logs within the block is also in the run's logs/process-N.log.

    Five files of 10 MB are kept. Of the processes that are not the first only warnings are kept and shown, with the
    process's number before them.
    """
    index = jax.process_index()
    (run / "logs").mkdir(exist_ok=True)
    path = run / "logs" / f"process-{index}.log"
    kept = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, delay=True, encoding="utf-8")
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept.setLevel(logging.INFO if index == 0 else logging.WARNING)
    ours, shown = logging.getLogger("eurollm_jax"), logging.getLogger().handlers
    before = [(handler, handler.level, handler.formatter) for handler in shown]
    ours.addHandler(kept)
    if index:
        for handler in shown:
            handler.setLevel(max(handler.level, logging.WARNING))
            handler.setFormatter(logging.Formatter(f"process {index}: %(message)s"))
    try:
        yield
    finally:
        ours.removeHandler(kept)
        kept.close()
        for handler, level, formatter in before:
            handler.setLevel(level)
            handler.setFormatter(formatter)
