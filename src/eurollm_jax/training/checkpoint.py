"""Checkpoints of a run: written by Orbax in the background, committed by a rename, trusted only if every hash agrees.

Orbax loads a file with a flipped bit as wrong weights, without a word. So each checkpoint carries `MANIFEST.sha256`,
one line per file in the format that `sha256sum --check` reads. The callback that writes it is called when all files of
a save are in place and the rename is still to come: it is committed with them (a test guards that order).
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from eurollm_jax.corpus.folders import file_sha256, new_folder
from eurollm_jax.errors import UserError
from eurollm_jax.training.weights import (
    STATE,
    AveragedWeights,
    Index,
    Item,
    PieceHandler,
    SavedWeights,
    leaves_to_write,
    save_args,
)

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.sha256"
OF_ORBAX = "_CHECKPOINT_METADATA"  # times of the save; Orbax writes it again at the rename, and no restore reads it


class Checkpoints:
    """The checkpoints of one run, a numbered folder each.

    A checkpoint holds `state`, a tree of arrays, and `progress`, a small JSON object. Opening verifies the newest one;
    a damaged one is set aside with a line in the log, and the one before takes its place. Opened `read_only`, nothing
    is touched, so that a run can be looked at while it trains. Devices are used by saving and restoring alone.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        self._read_only = read_only
        self._verified: dict[int, bool] = {}  # step -> whether it is sound
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.latest = next(self._sound(), None)
        """The step of the newest sound checkpoint, if there is one."""

    def steps(self) -> list[int]:
        """The steps of all sound checkpoints, the newest last. Each file is hashed once, at the first call."""
        return list(self._sound())[::-1]

    def weights(self, step: int | None = None, item: Item = "params") -> SavedWeights:
        """The parameters of the newest checkpoint, or of another one, or the moving average of them that it holds."""
        if step is not None and not (self._path(step).is_dir() and self._is_sound(step)):
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.folder} holds no sound checkpoint of step {step}: choose one of {there}.")
        return SavedWeights(self._path(self._newest() if step is None else step), item)

    def averaged(self, last: int) -> AveragedWeights:
        """The mean of the parameters in the newest `last` checkpoints."""
        if last < 1:
            raise UserError(f"an average of the last {last} checkpoints has no members: ask for 1 or more.")
        steps = list(islice(self._sound(), last))
        if len(steps) < last:
            raise UserError(
                f"{self.folder} holds {len(steps)} sound checkpoints, too few for an average of the last {last}: "
                f"average fewer, or train with keep_checkpoints={last} or more."
            )
        return AveragedWeights([SavedWeights(self._path(step)) for step in reversed(steps)])

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state and returns; the files follow. Raises here what went wrong with the save before."""
        self.wait()
        self.latest = step
        parts = _parts(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(parts, save_args=save_args(parts)), progress=ocp.args.JsonSave(dict(progress))
            ),
        )

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest sound checkpoint, or another one, in the shapes, types and shardings of `abstract`."""
        parts, progress = self._restore(_parts(abstract), partial=False, step=step)
        return parts if isinstance(abstract, Mapping) else replace(abstract, **parts), progress

    def restore_params(self, abstract: Any, item: Item = "params") -> tuple[Any, dict[str, Any]]:
        """Like `restore`, but only the parameters, or their moving average."""
        self.weights(item=item)  # says so where there is none
        parts, progress = self._restore({item: abstract}, partial=True)
        return parts[item], progress

    def wait(self) -> None:
        """Until the save under way is committed; raises its error."""
        if "_manager" in self.__dict__:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        if "_manager" in self.__dict__:
            self._manager.close()

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is needed: it starts the devices."""
        arrays, numbers = _handlers()
        sealing = ocp.AsyncOptions(post_finalization_callback=self._seal_latest)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if self._read_only else self._keep,
                cleanup_tmp_directories=not self._read_only,
                create=False,
                async_options=None if self._read_only else sealing,
            ),
            item_handlers={STATE: arrays, "progress": numbers},
        )

    def _seal_latest(self) -> None:
        """Called by Orbax in its saving thread."""
        (unfinished,) = self.folder.glob(f"{self.latest}.orbax-checkpoint-tmp*")
        _seal(unfinished)

    def _restore(
        self, abstract: Mapping[str, Any], *, partial: bool, step: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        step = self._newest() if step is None else step
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=args, progress=ocp.args.JsonRestore()))
        return restored["state"], restored["progress"]

    def _newest(self) -> int:
        self.wait()
        if self.latest is None:
            raise UserError(f"{self.folder} holds no sound checkpoint: train the run first.")
        return self.latest

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _sound(self) -> Iterator[int]:
        """The steps of the checkpoints that are as they were written, the newest first, verified as they are met."""
        steps = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()]
        return (step for step in sorted(steps, reverse=True) if self._is_sound(step))

    def _is_sound(self, step: int) -> bool:
        """Verifies a checkpoint once; a damaged one is named in the log and, unless `read_only`, renamed."""
        if step in self._verified:
            return self._verified[step]
        path = self._path(step)
        problems = faults(path)
        if not path.is_dir():
            return False  # the run has removed it meanwhile
        if problems:
            named = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            log.error("checkpoint %s is damaged (%s): the one before it takes its place", path, named)
            if not self._read_only:
                path.rename(self.folder / f"{step}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
                return False
        self._verified[step] = not problems
        return not problems


def write_checkpoint(
    folder: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Iterable[tuple[str, Index, np.ndarray]],
    progress: Mapping[str, Any],
) -> None:
    """Writes the checkpoint `folder/step` with nothing but parameters, from pieces, in the memory of a few of them.

    `shapes` are of all weights by path, with their stacked axes; `pieces` are as `PieceHandler` takes them, and are
    stored in float32. The checkpoint is there when this returns, and nothing is after an error or a kill. Raises
    UserError where the checkpoint is there already, and OSError where the disk is full.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.ShapeDtypeStruct, PieceHandler(pieces)),
        (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),  # Orbax warns where it is missing
    )
    arrays, numbers = _handlers(type_handler_registry=registry)
    with new_folder(folder.absolute() / str(step)) as unfinished:
        parts = {STATE: (arrays, ocp.args.PyTreeSave(leaves_to_write(shapes)))}
        parts |= {"progress": (numbers, ocp.args.JsonSave(dict(progress)))}
        for name, (handler, content) in parts.items():
            (unfinished / name).mkdir()
            handler.save(unfinished / name, args=content)
            handler.finalize(unfinished / name)
            handler.close()
        (unfinished / OF_ORBAX).write_text("{}")  # Orbax warns at each restore where it is missing
        _seal(unfinished)


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line for each file; empty where it is sound."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    found = _hashes(checkpoint)
    problems = []
    for number, line in enumerate(manifest.read_text(errors="replace").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if not name:
            problems.append(f"{MANIFEST} line {number} is not a hash and a name")
        elif name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != digest:
            problems.append(f"{name} is not what was written")
    return problems or ([] if found else ["it holds no files"])


def _hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, OF_ORBAX)]

    def digest(path: Path) -> str | None:
        with suppress(FileNotFoundError):  # a run that trains removes old ones
            return file_sha256(path)
        return None

    with ThreadPoolExecutor() as pool:
        found = zip(paths, pool.map(digest, paths), strict=True)
        return {path.relative_to(folder).as_posix(): content for path, content in found if content is not None}


def _seal(unfinished: Path) -> None:
    lines = (f"{digest}  {name}\n" for name, digest in _hashes(unfinished).items())
    (unfinished / MANIFEST).write_text("".join(lines))


def _handlers(**options: Any) -> tuple[ocp.PyTreeCheckpointHandler, ocp.JsonCheckpointHandler]:
    """Of a checkpoint's two parts."""
    arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False, **options)
    return arrays, ocp.JsonCheckpointHandler()


def _parts(state: Any) -> dict[str, Any]:
    """The parts of a state by name. One that is None is left out: a state with and without it is then stored alike."""
    parts = state if isinstance(state, Mapping) else {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: part for name, part in parts.items() if part is not None}
