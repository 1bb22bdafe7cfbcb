"""Best-fit packing: rows of whole documents wherever a document fits into a row, by random access to a stored plan.

Concatenation cuts every document that happens to lie across a row's end; here a document is cut only where it is longer
than a row. Which document goes into which row is planned once for each source of a store and length of row, and kept
beside the store: `STORE/packings/best-fit-LENGTH/SOURCE.plan/`.
"""

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from eurollm_jax.corpus.folders import differences, file_sha256, raced_folder, read_json, write_json
from eurollm_jax.corpus.store import MANIFEST_NAME, Source, manifest_sha256
from eurollm_jax.data.bin_packing import Plan, plan_rows
from eurollm_jax.data.packing import Lines, Span
from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "eurollm best-fit plan"
VERSION = 1  # another version is another plan for the same documents
PLAN_NAME = "plan.json"
COLUMNS = ("row_first", "starts", "lengths", "last_rows")


@dataclass(frozen=True)
class BestFitPacking:
    """A source's documents in rows of `length` places, as its plan says; picklable. Open it with `open`.

    A piece of a document takes as many places as it has predictions: the input at each of them has its target in the
    same document. A document's last token is therefore a target only, and one of fewer than two tokens is in no row.
    """

    source: Source
    length: int
    folder: Path  # of the plan
    rows: int  # in one epoch
    whole_rows: int  # the first rows, each a piece of one document
    digest: str  # SHA-256 of the plan's manifest, in hex

    @classmethod
    def open(cls, source: Source, length: int, store_path: Path) -> "BestFitPacking":
        """The plan of a source of the store at `store_path`; made first, and kept there, if it is not there yet.

        Raises UserError for a plan that cannot be written, is damaged, or is of other documents than the source's.
        """
        folder = plan_folder(store_path, source.name, length)
        documents = _identity(store_path, source, length)
        if not (folder / PLAN_NAME).is_file():
            try:
                with _alone(folder.parent):
                    if not (folder / PLAN_NAME).is_file():
                        _write(folder, plan_rows(source.offsets, length), documents)
            except OSError as error:
                raise UserError(
                    f"the best-fit plan of {source.name} for rows of {length} tokens cannot be written to {folder} "
                    f"({error.strerror}); run 'eurollm corpus pack {store_path} --length {length}' where the store can "
                    'be written to, or use packing="concat"'
                ) from None
        manifest = _checked(folder)
        if differing := differences(manifest["documents"], documents):
            raise UserError(f"{folder} is a plan for other documents: {differing}; delete that folder to plan anew")
        return cls(source, length, folder, manifest["rows"], manifest["whole_rows"], manifest["sha256"])

    def __reduce__(self) -> tuple[type["BestFitPacking"], tuple[Any, ...]]:
        return BestFitPacking, (self.source, self.length, self.folder, self.rows, self.whole_rows, self.digest)

    @cached_property
    def _row_first(self) -> Int64[np.ndarray, " rows+1"]:
        return self._load("row_first")

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " pieces"]:
        return self._load("starts")

    @cached_property
    def _lengths(self) -> Integer[np.ndarray, " pieces"]:
        return self._load("lengths")

    @cached_property
    def _last_rows(self) -> Int64[np.ndarray, " documents"]:
        return self._load("last_rows")

    def lines(self, rows: Int64[np.ndarray, " n"]) -> Lines:
        """Where the rows' tokens lie. Every piece is one read and one stretch, and each of its places has a target."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all from 0 to {self.rows - 1}")
        first = self._row_first[rows]
        counts = self._row_first[rows + 1] - first
        before = np.cumsum(counts) - counts  # pieces of the rows before
        pieces = np.repeat(first - before, counts) + np.arange(counts.sum())
        starts, lengths = self._starts[pieces], self._lengths[pieces].astype(np.int64)
        row = np.repeat(np.arange(len(rows)), counts)
        places = np.cumsum(lengths) - lengths
        places -= np.repeat(places[before], counts)
        nothing = np.empty(0, np.int64)
        return Lines(row, places, starts, lengths, row, places, nothing, nothing)

    def documents(self, row: int) -> list[Span]:
        """The documents among the row's inputs, in order."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not below {self.rows}")
        lines = self.lines(np.array([row]))
        offsets = self.source.offsets
        documents = np.searchsorted(offsets, lines.read_start, side="right") - 1
        firsts = lines.read_start - offsets[documents]
        columns = (documents, firsts, lines.read_length, lines.read_place)
        return [Span(*span) for span in zip(*(column.tolist() for column in columns), strict=True)]

    def rows_of(self, document: int) -> Sequence[int]:
        """The rows that have any of the document's tokens among their inputs: the inverse of `documents`."""
        if not 0 <= document < self.source.documents:
            raise IndexError(f"document {document} is not below {self.source.documents}")
        begin, end = self.source.offsets[document : document + 2].tolist()
        wholes, rest = divmod(max(end - begin - 1, 0), self.length)
        first = int(np.searchsorted(self._starts[: self.whole_rows], begin)) if wholes else 0
        return [*range(first, first + wholes), *([int(self._last_rows[document])] if rest else [])]

    def describe(self) -> dict[str, Any]:
        """What decides the rows."""
        return {"packing": "best-fit", "plan": self.digest}

    def verify(self) -> None:
        """Reads and hashes the plan. Raises UserError that names the files that are not as they were written."""
        verify_plan(self.folder)

    def _load(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


def plan_folder(store_path: Path, source: str, length: int) -> Path:
    return store_path / "packings" / f"best-fit-{length}" / f"{source}.plan"


def verify_plan(folder: Path) -> None:
    """Reads and hashes a plan's files. Raises UserError that names those that are not as they were written."""
    files = _checked(folder)["files"]
    if damaged := [name for name, entry in files.items() if file_sha256(folder / name) != entry["sha256"]]:
        raise UserError(f"{folder} is damaged in {', '.join(damaged)}; delete that folder to plan anew")


def verify_plans(store_path: Path) -> int:
    """Verifies every plan that lies beside a store; returns how many there are. Raises UserError that names all that
    are damaged."""
    folders = sorted(path.parent for path in (store_path / "packings").rglob(PLAN_NAME))
    faults = []
    for folder in folders:
        try:
            verify_plan(folder)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(". ".join(faults))
    return len(folders)


def _identity(store_path: Path, source: Source, length: int) -> dict[str, Any]:
    """What decides a plan: where the documents begin, and the length of a row."""
    entry = read_json(store_path / MANIFEST_NAME)["sources"][source.name]
    return {"source": source.name, "offsets": entry["files"]["offsets.npy"]["sha256"], "length": length}


def _write(folder: Path, plan: Plan, documents: dict[str, Any]) -> None:
    with raced_folder(folder) as partial:
        files = {}
        for name in COLUMNS:
            path = partial / f"{name}.npy"
            np.save(path, getattr(plan, name))
            files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "documents": documents,
            "rows": len(plan.row_first) - 1,
            "whole_rows": plan.whole_rows,
            "files": files,
        }
        write_json(partial / PLAN_NAME, manifest | {"sha256": manifest_sha256(manifest)})


def _checked(folder: Path) -> dict[str, Any]:
    """A plan's manifest, with every file there in its full size; UserError otherwise."""
    if not (folder / PLAN_NAME).is_file():
        raise UserError(f"{folder} has no {PLAN_NAME}; delete that folder to plan anew")
    manifest = read_json(folder / PLAN_NAME)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{folder} is not a best-fit plan of version {VERSION}; delete that folder to plan anew")
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise UserError(f"{folder / PLAN_NAME} is damaged (its own hash does not fit); delete {folder} to plan anew")
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != entry["size"]:
            raise UserError(
                f"{folder / name} has {size} bytes and should have {entry['size']}; delete {folder} to plan anew"
            )
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a folder, waiting for whoever holds it: processes that start together need the same plan."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process writes to %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # some cluster file systems have no locks: each plans for itself, and one plan is kept
        yield
