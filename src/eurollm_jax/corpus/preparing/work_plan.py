"""The work of preparing a store, cut into units that any process that sees the disk can do, alone and in any order.

The cut follows from the inputs alone, never from how many tasks share them, so the store is the same however the work
is divided. The plan lies beside the store, in `OUT.parts/plan.json`, and each unit that is done in `OUT.parts/units`,
where it appears by one rename: a kill at any moment costs at most the units in progress.
"""

import dataclasses
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from eurollm_jax.corpus.blocklist import Blocklist
from eurollm_jax.corpus.folders import differences, discard_folder, raced_folder, read_json, write_json
from eurollm_jax.corpus.preparing.input_files import file_names
from eurollm_jax.corpus.reading import path_names
from eurollm_jax.corpus.reading.sources import SUFFIXES, Defaults, Part, find_parts, part_files
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

PLAN_NAME, RECORD_NAME, UNITS_NAME = "plan.json", "record.json", "units"

# Large enough that a unit's files are few beside its content, small enough that all cores end at about the same time.
UNIT_BYTES = (1 << 23, 1 << 28)
_UNITS = 256


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What decides a store beside its inputs and tokenizer.

    `language`, `source`, `licence` and `fields` are those of `sources.Defaults`. `by` names the store's sources: by
    language ("fi"), or by language and the documents' own source ("fi/hplt"). `deduplicate` keeps the first of the
    documents with the same text. `blocklist` is a file for `Blocklist.load`. A document that cannot be used ends the
    work if `bad_documents` is "stop", else it is left out and recorded; that choice may change until the work is done.
    """

    language: str | None = None
    source: str | None = None
    licence: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    by: Literal["language", "origin"] = "language"
    deduplicate: bool = False
    blocklist: Path | None = None
    bad_documents: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name, choices in (("by", ("language", "origin")), ("bad_documents", ("stop", "skip"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {' or '.join(map(repr, choices))}")

    @property
    def defaults(self) -> Defaults:
        return Defaults(self.language, self.source, self.licence, self.fields)

    def identity(self) -> dict[str, Any]:
        """What finished work must agree in, JSON-able: a block-list counts by its content."""
        blocklist = Blocklist.load(self.blocklist).sha256 if self.blocklist else None
        defaults = dataclasses.asdict(self.defaults) | {"fields": dict(sorted(self.fields.items()))}
        return {**defaults, "by": self.by, "deduplicate": self.deduplicate, "blocklist": blocklist}


@dataclass(frozen=True)
class WorkPlan:
    """`units` are the parts that each unit reads, in the order of the documents, or how many units another program
    will hand in; `options` is `PrepareOptions.identity()`; `command` is what makes missing units."""

    folder: Path
    tokenizer: Mapping[str, Any]  # `sha256` and `vocab_size`, as in a manifest
    options: Mapping[str, Any]
    units: Sequence[Sequence[Part]]
    command: str

    @cached_property
    def names(self) -> dict[Path, str]:
        """Of each input file."""
        return file_names(part for unit in self.units for part in unit)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What work of the same plan agrees in, wherever the inputs lie."""
        names = {str(file): name for file, name in self.names.items()}
        order = list(dict.fromkeys(part.input for unit in self.units for part in unit))
        units = [[[names.get(part.input, part.input), part.first, part.stop] for part in unit] for unit in self.units]
        sizes: Counter[str] = Counter()
        for file, name in self.names.items():
            sizes[name] = file.stat().st_size if file.exists() else 0
        tokenizer = {"tokenizer": self.tokenizer["sha256"]}
        return {
            "tokenizer": tokenizer,
            "options": dict(self.options),
            "inputs": dict(sizes),
            "order": [[names[name], *_said_by_name(Path(name))] if name in names else [name] for name in order],
            "units": units,
        }

    @cached_property
    def sha256(self) -> str:
        """Of the identity, in hex: stands in every finished unit."""
        canonical = json.dumps(self.identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def unit_folder(self, number: int) -> Path:
        return self.folder / UNITS_NAME / f"{number:05}"

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of a finished unit, or None. Raises UserError when it is of another plan."""
        path = self.unit_folder(number) / RECORD_NAME
        if not path.is_file():
            return None
        record = read_json(path)
        if record["plan"] != self.sha256:
            raise UserError(f"{path.parent} was made by another plan; delete it and run the same command again")
        return record

    def settle(self) -> None:
        """Write the plan down, unless it is; tasks that start together agree in one.

        A plan of other work is replaced as long as nothing of it is done. Raises UserError, naming the differences,
        when some is.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if not self.folder.exists():
            with raced_folder(self.folder) as partial:
                write_json(partial / PLAN_NAME, self._to_json())
                (partial / UNITS_NAME).mkdir()
        if not (self.folder / PLAN_NAME).is_file():
            raise UserError(
                f"{self.folder} is there already and has no {PLAN_NAME}; delete it or choose another folder"
            )
        there = read_json(self.folder / PLAN_NAME)
        (self.folder / UNITS_NAME).mkdir(exist_ok=True)  # a kill may have come while the plan was abandoned
        if there["sha256"] == self.sha256:
            return
        difference = difference_of(there["identity"], self.identity)
        if any(not entry.name.startswith(".") for entry in (self.folder / UNITS_NAME).iterdir()):
            raise UserError(
                f"{self.folder} holds unfinished work on other data: {difference}; "
                "choose another folder, or delete this one to begin anew"
            )
        discard_folder(self.folder)
        self.settle()

    def abandon(self) -> None:
        """Remove the plan when nothing of it is done or in progress. For a process that does all of the work: of
        several, one that fails would take the plan away from those that have not begun."""
        with suppress(OSError):
            (self.folder / UNITS_NAME).rmdir()
            discard_folder(self.folder)

    @classmethod
    def load(cls, folder: Path) -> "WorkPlan":
        """The plan that was settled in `folder`. Raises UserError when there is none, or its inputs are not there."""
        if not (folder / PLAN_NAME).is_file():
            raise UserError(f"there is no work at {folder}; begin it with 'eurollm corpus prepare'")
        there = read_json(folder / PLAN_NAME)
        units = [[Part(**part) for part in unit] for unit in there["units"]]
        plan = cls(folder, there["tokenizer"], there["options"], units, there["command"])
        for unit in units:
            for part in unit:
                for file in part_files(part):
                    if not file.exists():
                        raise UserError(f"{file} is missing, which {folder} was made from; put it back")
        if plan.sha256 != there["sha256"]:
            difference = difference_of(there["identity"], plan.identity)
            raise UserError(f"the inputs of {folder} changed: {difference}; mend that, or delete the folder")
        return plan

    def _to_json(self) -> dict[str, Any]:
        units = [[dataclasses.asdict(part) for part in unit] for unit in self.units]
        what = {"command": self.command, "tokenizer": dict(self.tokenizer), "options": dict(self.options)}
        return {**what, "sha256": self.sha256, "identity": self.identity, "units": units}


def work_folder(out: Path) -> Path:
    """Where the plan and the finished units of the store `out` lie until it is whole."""
    return out.with_name(f"{out.name}.parts")


def make_plan(given: Sequence[str | Path], tokenizer: Tokenizer, out: Path, options: PrepareOptions) -> WorkPlan:
    """Cut the inputs `given` into units. Raises UserError for inputs that are missing or cannot be read."""
    total = sum(part.bytes for part in find_parts(given))
    unit_bytes = min(max(total // _UNITS, UNIT_BYTES[0]), UNIT_BYTES[1])
    units = cut(find_parts(given, part_bytes=unit_bytes), unit_bytes)
    described = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    command = ["eurollm", "corpus", "prepare", *map(str, given), "--tokenizer", str(tokenizer.model_path)]
    return WorkPlan(
        folder=work_folder(out),
        tokenizer=described,
        options=options.identity(),
        units=[[_absolute(part) for part in unit] for unit in units],
        command=shlex.join([*command, "--out", str(out), *_flags(options)]),
    )


def _absolute(part: Part) -> Part:
    path = os.path.abspath(part.input)
    return dataclasses.replace(part, input=path) if os.path.exists(path) else part


def _flags(options: PrepareOptions) -> list[str]:
    """The options as they are given on the command line, but those that have their default."""
    flags = []
    for name in ("language", "source", "licence", "by", "blocklist", "bad_documents"):
        if (value := getattr(options, name)) != getattr(PrepareOptions(), name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    for ours, theirs in options.fields.items():
        flags += ["--field", f"{ours}={theirs}"]
    return flags + ["--deduplicate"] * options.deduplicate


def _said_by_name(path: Path) -> list[str]:
    """What a file's name and its folders' say of its documents, which a copy elsewhere may not."""
    try:
        language = path_names.language_of(path, SUFFIXES)
    except UserError:  # two languages; refused when a document needs it
        language = "?"
    return [path_names.corpus_of(path, SUFFIXES), language]


def cut(parts: Sequence[Part], unit_bytes: int) -> list[list[Part]]:
    """Group consecutive parts into units of at most `unit_bytes`, or of one larger part."""
    units: list[list[Part]] = []
    room = 0
    for part in parts:
        if part.bytes > room or not units:
            units.append([])
            room = unit_bytes
        units[-1].append(part)
        room -= part.bytes
    return units


def difference_of(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two identities, as half a sentence; "" when they are equal."""
    found = [differences(there[part], here[part]) for part in ("tokenizer", "options", "inputs")]
    if not any(found) and there["order"] != here["order"]:
        found = ["the inputs come in another order, or their folder's name says another language"]
    if not any(found) and there["units"] != here["units"]:
        found = ["the inputs are cut at other places"]
    return ", ".join(filter(None, found))
