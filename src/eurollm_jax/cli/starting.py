"""What commands that train share: how time limits are written, and signals before and after training."""

import argparse
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from eurollm_jax.errors import StoppedError


def with_time_limit(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--time-limit",
        type=seconds,
        metavar="HH:MM:SS",
        help="save and end with status 75 before so much time has passed; the same command goes on",
    )
    return parser


def seconds(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write it as 23:50:00 or 1-12:00:00")
    days, hours, minutes, left = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + left)


def _end_at_once(number: int, frame: object) -> NoReturn:
    """While nothing is being trained all that was is saved, and there is nobody to wait for."""
    name = signal.Signals(number).name
    said = f"eurollm: stopped by {name} while nothing was being trained; the same command goes on"
    os.write(2, f"{said}\n".encode())
    os._exit(StoppedError.status)


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Until the loop takes them, and after it."""
    main = threading.current_thread() is threading.main_thread()  # no other may
    numbers = (signal.SIGTERM, signal.SIGUSR1) if main else ()
    before = {number: signal.signal(number, _end_at_once) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
