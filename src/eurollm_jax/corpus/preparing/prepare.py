"""Documents to a token store: cut the work into units, do them on all cores or as one task of many, then finalize.

See `work_plan` for what a unit is and `finalize` for how units become the store.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eurollm_jax.corpus.folders import discard_folder, full_disk_is_named, read_json, removal_is_named
from eurollm_jax.corpus.preparing.finalize import RESULT_NAME, finalize
from eurollm_jax.corpus.preparing.input_files import change
from eurollm_jax.corpus.preparing.processes import run_jobs
from eurollm_jax.corpus.preparing.unit import STAYS, prepare_unit
from eurollm_jax.corpus.preparing.work_plan import PrepareOptions, WorkPlan, difference_of, make_plan
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

__all__ = ["PrepareOptions", "prepare", "prepare_task"]


def prepare(
    inputs: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    out: Path,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008
    *,
    workers: int | None = None,
) -> TokenStore:
    """Encode the documents of `inputs` (see `sources.find_parts`) into a store in folder `out`.

    Documents keep the order of the inputs; each becomes `[begin, *ids, eos]`, where begin is bos, or eos where
    the tokenizer has no bos. The work is shared by `workers` processes, by default one for each core this process may
    use. What an earlier run of the same work has done is not done again.
    When `out` holds the store of the same inputs, tokenizer and options, that is returned and nothing is written.

    Where the tokenizer brings text into a normal form of Unicode, the store's texts, bytes and hashes are those after
    it, and this is said.

    Raises UserError for a bad input, with file and line or document; for a tokenizer that loses text, and a document
    that does not decode to its own; for a full disk or a worker that was killed; and when `out`, or the work begun
    beside it, is of other data.
    """
    _check_tokenizer(tokenizer)
    plan = make_plan(_several(inputs), tokenizer, out, options)
    if (store := _existing(out, plan, options)) is not None:
        return store
    try:
        _do(plan, range(len(plan.units)), tokenizer, options, workers)
        _check_refused(plan, options)
        return finalize(out, workers=workers)
    except BaseException as error:
        plan.abandon()
        # Another process that did the same work may have finished it, and removed what we were at.
        if isinstance(error, UserError) and (store := _existing(out, plan, options)) is not None:
            return store
        raise


def prepare_task(
    inputs: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    out: Path,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008
    *,
    task: int,
    of: int,
    workers: int | None = None,
) -> int:
    """Do the units `task`, `task + of`, ... of the work of `prepare`, and return how many units these are.

    When all tasks, 0 to `of` - 1, have ended, `finalize(out)` makes the store. Raises UserError as `prepare` does.
    """
    if not 0 <= task < of:
        raise UserError(f"there is no task {task} of {of}; tasks are numbered from 0 to {of - 1}")
    _check_tokenizer(tokenizer)
    plan = make_plan(_several(inputs), tokenizer, out, options)
    numbers = range(task, len(plan.units), of)
    if _existing(out, plan, options) is None:
        _do(plan, numbers, tokenizer, options, workers)
        print(f"task {task} of {of} has done its {len(numbers)} of {len(plan.units)} units: {plan.folder}")
    return len(numbers)


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.require_lossless()
    if tokenizer.normal_form:
        print(
            f"{tokenizer.model_path} brings text into {tokenizer.normal_form}: the store's texts, bytes and hashes are "
            "those after it",
            file=sys.stderr,
        )


def _do(
    plan: WorkPlan, numbers: Sequence[int], tokenizer: Tokenizer, options: PrepareOptions, workers: int | None
) -> None:
    """Do those of the units `numbers` that are not done."""
    with removal_is_named(plan.folder), full_disk_is_named(plan.folder, STAYS):
        plan.settle()
        done = {number: record for number in numbers if (record := plan.record(number)) is not None}
        files = {name: file for file, name in plan.names.items()}
        for record in done.values():
            _check_files(f"{plan.folder} was begun with other data", files, record["files"])
        left = [number for number in numbers if number not in done]
        cores = len(os.sched_getaffinity(0))
        workers = max(1, min(workers or cores, len(left)))
        job = functools.partial(_unit_job, plan, tokenizer, options, max(1, cores // workers))
        rescue = f"what is done stays in {plan.folder}: run the same command again, with fewer workers"
        with _progress(plan, done, left) as (show, end):
            for number, text_bytes in run_jobs(job, left, workers=workers, show=show, rescue=rescue):
                end(number, text_bytes)


def _unit_job(
    plan: WorkPlan,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    threads: int,
    number: int,
    tick: Callable[[int], None],
) -> tuple[int, int]:
    return number, prepare_unit(plan, number, tokenizer, options, threads=threads, tick=tick)["bytes"]


def _existing(out: Path, plan: WorkPlan, options: PrepareOptions) -> TokenStore | None:
    """The finished store in `out`, or None if nothing is there. Raises UserError when it is of other data."""
    if not (out / RESULT_NAME).is_file():
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already; choose another folder or delete it")
        return None
    there = read_json(out / RESULT_NAME)
    if difference := difference_of(there["identity"], plan.identity):
        raise UserError(f"{out} holds the store of other data: {difference}; choose another folder or delete it")
    _check_files(
        f"{out} holds the store of other data", {name: file for file, name in plan.names.items()}, there["files"]
    )
    if there["refused"] and options.bad_documents == "stop":
        raise UserError(f"{out} was made without {there['refused']:,} bad documents; ask to skip them, or delete it")
    print(f"{out} holds this store already", file=sys.stderr)
    discard_folder(plan.folder)  # left behind when the last run was killed right after it had finished the store
    return TokenStore.open(out)


def _check_files(what: str, files: Mapping[str, Path], records: Mapping[str, Any]) -> None:
    if changes := [found for name, record in records.items() if (found := change(files[name], record))]:
        raise UserError(f"{what}: {', '.join(changes[:3])}; choose another folder or delete it")


def _check_refused(plan: WorkPlan, options: PrepareOptions) -> None:
    if options.bad_documents == "skip":
        return
    for number in range(len(plan.units)):
        record = plan.record(number)
        if record and record["refused"]:
            first = record["refused"][0]["reason"].partition(";")[0]
            raise UserError(f"{plan.folder} was begun skipping bad documents ({first}); skip them still, or delete it")


def _several(inputs: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [inputs] if isinstance(inputs, str | Path) else list(inputs)


@contextmanager
def _progress(
    plan: WorkPlan, done: Mapping[int, Mapping[str, Any]], left: Sequence[int]
) -> Iterator[tuple[Callable[[int], None], Callable[[int, int], None]]]:
    """A bar over the inputs' bytes on disk. Yields what to call with the bytes of text so far, and at a unit's end.

    Within a unit the text says how far it is: compressed inputs run ahead there, by at most the units in progress.
    """
    console = Console(stderr=True)
    sizes = {number: sum(part.bytes for part in plan.units[number]) for number in (*done, *left)}
    start, ended_bytes, ended_text = time.monotonic(), sum(sizes[number] for number in done), 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=sum(sizes.values()), completed=ended_bytes, rate="")
        largest = max((sizes[number] for number in left), default=0)
        shown_text = 0

        def show(text: int) -> None:
            nonlocal shown_text
            shown_text = max(text, shown_text)
            megabytes = shown_text / 1e6
            rate = f"{megabytes:,.1f} MB of text at {megabytes / (time.monotonic() - start + 1e-9):.1f} MB/s"
            within = min(max(shown_text - ended_text, 0), largest * (os.cpu_count() or 1))
            bar.update(task, completed=min(ended_bytes + within, sum(sizes.values())), rate=rate)

        def end(number: int, text: int) -> None:
            nonlocal ended_bytes, ended_text
            ended_bytes, ended_text = ended_bytes + sizes[number], ended_text + text
            show(ended_text)

        yield show, end
    megabytes = ended_text / 1e6
    if left:
        rate = megabytes / (time.monotonic() - start)
        print(f"{megabytes:.1f} MB of text encoded at {rate:.1f} MB/s", file=sys.stderr)
