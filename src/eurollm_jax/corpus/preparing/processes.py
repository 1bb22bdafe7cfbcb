"""Jobs on all cores: worker processes that end when their parent does, report progress, and stop together."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from eurollm_jax.errors import UserError

_POLL_SECONDS = 0.2

# Of a worker process.
_job: Callable[..., Any]
_tick: Callable[[int], None]


class _Stopped(Exception):
    """Another job failed, so this one ends."""


def run_jobs(
    job: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    workers: int,
    show: Callable[[int], None],
    rescue: str,
) -> Iterator[Any]:
    """Yield `job(argument, tick)` for each of `arguments`, as they end; `tick` takes amounts of work that are done.

    `show` is called several times a second with all amounts so far. With one worker, or one argument, the jobs run in
    this process, else in new ones. An exception in one ends all. Raises UserError, ending with `rescue`, when a worker
    was killed.
    """
    if min(workers, len(arguments)) <= 1:
        done = 0

        def tick(amount: int) -> None:
            nonlocal done
            done += amount
            show(done)

        yield from (job(argument, tick) for argument in arguments)
        return
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, counter, stop))
    try:
        waiting = {executor.submit(_work, argument) for argument in arguments}
        while waiting:
            ended, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            show(counter.value)
            yield from (future.result() for future in ended)
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed, perhaps for want of memory; {rescue}") from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _work(argument: Any) -> Any:
    return _job(argument, _tick)


def _start_worker(job: Callable[..., Any], counter: Any, stop: Any) -> None:
    global _job, _tick
    follow_parent()

    def tick(amount: int) -> None:
        with counter.get_lock():
            counter.value += amount
        if stop.is_set():
            raise _Stopped

    _job, _tick = job, tick


def follow_parent() -> None:
    """For the start of a worker process: from now on it ends when its parent does, however that ends, and leaves an
    interrupt from the keyboard to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
