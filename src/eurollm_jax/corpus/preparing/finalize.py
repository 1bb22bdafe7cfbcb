"""Finished units to one store: check that all are there and of this plan, drop duplicates, merge, seal the manifest."""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from eurollm_jax.corpus.folders import (
    discard_folder,
    full_disk_is_named,
    new_folder,
    read_json,
    removal_is_named,
    write_json,
)
from eurollm_jax.corpus.preparing.duplicates import later_duplicates
from eurollm_jax.corpus.preparing.input_files import change, merged
from eurollm_jax.corpus.preparing.merge import Piece, merge_source
from eurollm_jax.corpus.preparing.processes import run_jobs
from eurollm_jax.corpus.preparing.unit import STAYS
from eurollm_jax.corpus.preparing.work_plan import WorkPlan, work_folder
from eurollm_jax.corpus.store import MANIFEST_NAME, TokenStore, manifest_sha256
from eurollm_jax.corpus.store_writer import SHARD_TOKENS, write_manifest
from eurollm_jax.errors import UserError

RESULT_NAME, REFUSED_NAME = "prepare.json", "refused.jsonl"

# Below this many bytes, starting processes takes longer than copying.
_WORTH_PROCESSES = 1 << 28


def finalize(out: Path, *, workers: int | None = None, shard_tokens: int = SHARD_TOKENS) -> TokenStore:
    """Merge the finished units of the store `out` into that store, and delete them.

    Units are read once, checked against their hashes, and their sources are copied by `workers` processes, by default
    one for each core this process may use. The disk must hold the tokens twice meanwhile. A kill loses nothing but the
    time. When the store is there already it is returned.

    Raises UserError, naming them, for units that are missing, damaged or of other work; for inputs that changed since
    they were read; for a full disk; and when all documents were left out.
    """
    work = work_folder(out)
    if not (out / RESULT_NAME).is_file():
        try:
            with removal_is_named(work), full_disk_is_named(out, STAYS):
                _finalize(WorkPlan.load(work), out, workers or len(os.sched_getaffinity(0)), shard_tokens)
        except UserError:
            if not (out / RESULT_NAME).is_file():  # else another process has done the same, and was first
                raise
    store = TokenStore.open(out)
    discard_folder(work)
    return store


def _finalize(plan: WorkPlan, out: Path, workers: int, shard_tokens: int) -> None:
    records = _records(plan)
    _check_inputs(plan, records)
    manifests = [_sources(plan.unit_folder(number)) for number in range(len(records))]
    dropped = _duplicates(plan, manifests)
    with new_folder(out) as folder:
        sources = _merge(plan, manifests, dropped, folder, workers, shard_tokens)
        if not sources:
            raise UserError(f"no document is left for {out}: all are refused or blocked; see {plan.folder}")
        write_manifest(folder, plan.tokenizer, sources)
        result = _result(plan, records, manifests, sources)
        if result["refused"]:
            with (folder / REFUSED_NAME).open("w", encoding="utf-8") as file:
                for record in records:
                    file.writelines(json.dumps(refused, ensure_ascii=False) + "\n" for refused in record["refused"])
        write_json(folder / RESULT_NAME, result)
    _say(out, result, sources)


def _records(plan: WorkPlan) -> list[dict[str, Any]]:
    found = [plan.record(number) for number in range(len(plan.units))]
    missing = [str(number) for number, record in enumerate(found) if record is None]
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
        raise UserError(
            f"{plan.folder} lacks {len(missing):,} of {len(found):,} units ({names}); make them with: {plan.command}"
        )
    return [record for record in found if record is not None]


def _check_inputs(plan: WorkPlan, records: Sequence[Mapping[str, Any]]) -> None:
    files = {name: file for file, name in plan.names.items()}
    for number, record in enumerate(records):
        changes = [found for name, read in record["files"].items() if (found := change(files[name], read))]
        if changes:
            what = f"{', '.join(changes[:3])} since unit {number} was made"
            raise UserError(f"{what}; put it back, or delete {plan.folder} and prepare again")


def _sources(unit: Path) -> dict[str, Any]:
    """What a finished unit's manifest says of its sources."""
    manifest = read_json(unit / MANIFEST_NAME)
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise UserError(f"{unit / MANIFEST_NAME} is damaged; delete its unit's folder and prepare again")
    return manifest["sources"]


def _duplicates(plan: WorkPlan, manifests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """For each unit the positions of the documents that are dropped."""
    if not plan.options["deduplicate"]:
        return [np.empty(0, np.int64)] * len(manifests)
    nothing = np.empty(0, np.int64)

    def hashes(unit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, entry in manifests[unit].items():
            piece = Piece(plan.unit_folder(unit) / name, entry, nothing)
            yield piece.column("sha256"), piece.column("positions")

    return later_duplicates([sum(entry["documents"] for entry in each.values()) for each in manifests], hashes)


def _merge(
    plan: WorkPlan,
    manifests: Sequence[Mapping[str, Any]],
    dropped: Sequence[np.ndarray],
    folder: Path,
    workers: int,
    shard_tokens: int,
) -> dict[str, Any]:
    """Write every source into `folder`; returns their entries in the manifest."""
    pieces: dict[str, list[Piece]] = {}
    for number, manifest in enumerate(manifests):
        for name, entry in manifest.items():
            piece = Piece(plan.unit_folder(number) / name, entry, dropped[number])
            pieces.setdefault(name, []).append(piece)
    size = {name: sum(p.entry["tokens"] * np.dtype(p.entry["dtype"]).itemsize for p in pieces[name]) for name in pieces}
    total = sum(size.values())
    largest_first = sorted(pieces, key=lambda name: (-size[name], name))
    job = functools.partial(_merge_job, folder, shard_tokens)
    rescue = f"{plan.folder} is whole: run the same command again, with fewer workers"
    columns = (TextColumn("merging"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        ended = run_jobs(
            job,
            [(name, pieces[name]) for name in largest_first],
            workers=workers if total > _WORTH_PROCESSES else 1,
            show=lambda done: bar.update(task, completed=done),
            rescue=rescue,
        )
        entries = dict(ended)
    return {name: entries[name] for name in sorted(entries) if entries[name]}


def _merge_job(
    folder: Path, shard_tokens: int, named: tuple[str, Sequence[Piece]], tick: Callable[[int], None]
) -> tuple[str, dict[str, Any] | None]:
    name, pieces = named
    return name, merge_source(folder / name, pieces, shard_tokens, tick)


def _result(
    plan: WorkPlan,
    records: Sequence[Mapping[str, Any]],
    manifests: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    """What the store was made from, and what was left out of it."""
    blocked, before = Counter[str](), Counter[str]()
    for record, manifest in zip(records, manifests, strict=True):
        blocked.update(record["blocked"])
        before.update({name: entry["documents"] for name, entry in manifest.items()})
    after = {name: entry["documents"] for name, entry in sources.items()}
    duplicates = {name: count - after.get(name, 0) for name, count in sorted(before.items())}
    return {
        "identity": plan.identity,
        "files": merged(record["files"] for record in records),
        "blocked": dict(sorted(blocked.items())),
        "duplicates": {name: count for name, count in duplicates.items() if count},
        "refused": sum(len(record["refused"]) for record in records),
        "refused_by_kind": dict(Counter(refused["kind"] for record in records for refused in record["refused"])),
    }


def _say(out: Path, result: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    tokens = sum(entry["tokens"] for entry in sources.values())
    lines = [f"{tokens:,} tokens in {len(sources)} sources: {out}"]
    for what, counts in (
        ("dropped as duplicates", result["duplicates"]),
        ("dropped by the block-list", result["blocked"]),
        (f"refused, see {out / REFUSED_NAME}", result["refused_by_kind"]),
    ):
        if counts:
            each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            lines.append(f"{sum(counts.values()):,} documents {what}: {each}")
    print("\n".join(lines), file=sys.stderr)
