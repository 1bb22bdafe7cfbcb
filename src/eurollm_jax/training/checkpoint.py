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


class Checkpoints:
    """The checkpoints of one run, a numbered folder each.

    A checkpoint holds `state`, a tree of arrays, and `progress`, a small JSON object. Opening verifies the newest one;
    a damaged one is set aside with a line in the log, and the one before takes its place.
    """

    def __init__(self, folder: Path, *, keep: int = 2, asynchronous: bool = True) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saving: int | None = None
        _set_damaged_aside(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )
        self._asynchronous = asynchronous

    def latest(self) -> int | None:
        """The step of the newest sound checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state and returns; the files follow. Raises here what went wrong with the save before."""
        self.wait()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(dict(progress))),
        )
        if not self._asynchronous:
            self.wait()

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
        if (step := self.latest()) is None:
            raise UserError(f"{self.folder} holds no checkpoint: train the run first.")
        return step

    def _seal(self) -> None:
        """Called by Orbax in its saving thread."""
        (unfinished,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
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
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _set_damaged_aside(folder: Path) -> None:
    """Renames damaged checkpoints, newest first, until one is sound."""
    for step in sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True):
        if not (problems := faults(folder / str(step))):
            return
        aside = folder / f"{step}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        (folder / str(step)).rename(aside)
        log.error(
            "checkpoint %s is damaged (%s): set aside as %s; the one before it takes its place",
            folder / str(step),
            "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""),
            aside.name,
        )
