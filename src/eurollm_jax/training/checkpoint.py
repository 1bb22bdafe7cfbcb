"""Checkpoints of a run: written by Orbax in the background, committed by a rename, trusted only if every hash agrees.

Orbax loads a file with a flipped bit as wrong weights, without a word. So each checkpoint carries `MANIFEST.sha256`,
one line per file in the format that `sha256sum --check` reads. The callback that writes it is called when all files of
a save are in place and the rename is still to come: it is committed with them (a test guards that order).
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.sha256"
OF_ORBAX = "_CHECKPOINT_METADATA"  # times of the save; Orbax writes it again at the rename, and no restore reads it


class Checkpoints:
    """The checkpoints of one run, a numbered folder each.

    A checkpoint holds `state`, a tree of arrays, and `progress`, a small JSON object. Opening verifies the newest one;
    a damaged one is set aside with a line in the log, and the one before takes its place. Opened `read_only`, nothing
    is touched, so that a run can be looked at while it trains.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        self.folder = folder.absolute()
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.latest = _newest_sound(self.folder, set_aside=not read_only)
        """The step of the newest sound checkpoint, if there is one."""
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                create=False,
                async_options=None if read_only else ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state and returns; the files follow. Raises here what went wrong with the save before."""
        self.wait()
        self.latest = step
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(dict(progress))),
        )

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The newest sound checkpoint, in the shapes, types and shardings of `abstract`."""
        step = self._newest()
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=args, progress=ocp.args.JsonRestore()))
        return restored["state"], restored["progress"]

    def restore_params(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Like `restore`, but only the parameters."""
        step, item = self._newest(), {"params": abstract}
        args = ocp.args.PyTreeRestore(
            item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=args, progress=ocp.args.JsonRestore()))
        return restored["state"]["params"], restored["progress"]

    def wait(self) -> None:
        """Until the save under way is committed; raises its error."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _newest(self) -> int:
        if self.latest is None:
            raise UserError(f"{self.folder} holds no sound checkpoint: train the run first.")
        return self.latest

    def _seal(self) -> None:
        """Called by Orbax in its saving thread."""
        (unfinished,) = self.folder.glob(f"{self.latest}.orbax-checkpoint-tmp*")
        (unfinished / MANIFEST).write_text(
            "".join(f"{digest}  {name}\n" for name, digest in _hashes(unfinished).items())
        )


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
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, OF_ORBAX):
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _newest_sound(folder: Path, *, set_aside: bool) -> int | None:
    """The newest checkpoint that is as it was written; damaged ones before it are renamed, if so asked."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    for step in sorted(steps, reverse=True):
        path = folder / str(step)
        if not (problems := faults(path)):
            return step
        named = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        log.error("checkpoint %s is damaged (%s): the one before it takes its place", path, named)
        if set_aside:
            path.rename(folder / f"{step}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
    return None
