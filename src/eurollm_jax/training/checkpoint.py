"""Checkpoints of a run: written by Orbax in the background, committed by a rename, trusted only if every hash agrees.

Several processes write one checkpoint together, read and verify it together, and go on from the same one. How a save
goes is in commit.py, how damage is found in manifest.py, and what is kept in saving.py.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from eurollm_jax.corpus.folders import new_folder
from eurollm_jax.errors import LostError, UserError
from eurollm_jax.parallel.messages import collected, process_number, told
from eurollm_jax.training.commit import (
    OF_ORBAX,
    PROGRESS,
    Content,
    RefusedError,
    Save,
    clear_unfinished,
    hide_aftermath,
    saved_in,
    settle,
)
from eurollm_jax.training.manifest import MANIFEST, Alive, agreed_faults, faults, seal
from eurollm_jax.training.saving import Kind, Saved, Saving
from eurollm_jax.training.weights import (
    STATE,
    AveragedWeights,
    Index,
    Item,
    PieceHandler,
    SavedWeights,
    leaves_to_write,
    system_error,
)

__all__ = ("MANIFEST", "Checkpoints", "faults", "write_checkpoint")

log = logging.getLogger(__name__)

PAUSES = (5.0, 15.0, 40.0)  # seconds before each further try of a save that may be the run's last

_TOPIC = "checkpoints"
_DAMAGED = ".damaged-"  # in a checkpoint's name, before the time at which it was set aside
_UNREAD = "could not be read: "


class Checkpoints:
    """The checkpoints of one run, a numbered folder each.

    A checkpoint holds `state`, a tree of arrays, and `progress`, a small JSON object. Opening verifies the newest one;
    a damaged one is set aside with a line in the log, and the one before takes its place. Opened `read_only`, nothing
    is touched, so that a run can be looked at while it trains. Devices are used by saving and restoring alone.

    `saving` says what is kept, `permanent` of which steps the checkpoint is no temporary one, and `decay_begins` which
    of these stands before a decay. `alive` is called now and then while files are read for their hashes. All processes
    of a run call what is here alike, and in the same order; where files cannot be read, all of them raise LostError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        saving: Saving | None = None,
        permanent: Callable[[int], bool] | None = None,
        decay_begins: int | None = None,
        read_only: bool = False,
        alive: Alive = lambda: None,
    ) -> None:
        self.folder = folder.absolute()
        self._saving, self._permanent, self._decay_begins = saving or Saving(), permanent, decay_begins
        self._read_only, self._alive = read_only, alive
        self._verified: dict[int, bool] = {}  # step -> whether it is sound
        self._save: Save | None = None
        self._failures, self._reason = 0, ""  # how many saves in a row, and why the last one
        self._refused: Save | None = None  # the last of them; its state is gone once a step has written to its memory
        settle(self.folder)
        if not read_only and process_number() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.folder)
        self.latest = next(self._sound(), None)
        """The step of the newest sound checkpoint, if there is one."""
        self.longest = 0.0
        """Seconds that the longest save took from its call to its commit, of those that have been waited for."""

    def steps(self) -> list[int]:
        """The steps of all sound checkpoints, the newest last. Each file is hashed once, at the first call."""
        return list(self._sound())[::-1]

    def newest_permanent(self, before: int) -> int | None:
        """The step of the newest sound checkpoint from before a step, without the temporary ones, whose steps depend on
        the wall clock. Older ones are not read."""
        return next(self._sound(lambda saved: saved.kind != "temporary" and saved.step < before), None)

    @property
    def set_aside(self) -> list[str]:
        """The names of the folders that were renamed because they were damaged, as the first process sees them."""
        names: list[str] = json.loads(
            told(_TOPIC, json.dumps(sorted(path.name for path in self.folder.glob(f"*{_DAMAGED}*"))))
        )
        return names

    def weights(self, step: int | None = None, item: Item = "params") -> SavedWeights:
        """The parameters of the newest checkpoint, or of another one, or the moving average of them that it holds."""
        if step is not None and not self._is_sound(step):
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
                f"average fewer, or train with saving.last={last} or more."
            )
        return AveragedWeights([SavedWeights(self._path(step)) for step in reversed(steps)])

    def save(self, step: int, state: Any, progress: Mapping[str, Any], score: float | None = None) -> None:
        """Copies the state and returns; the files follow, unless `saving` has it wait for them.

        `score` is the held-out one at this step, where there is one. A save that does not fit, or that the system
        refuses, is said in the log and leaves the checkpoints as they are; so many in a row as `saving` states raise
        UserError. Raises here, too, what else went wrong with the save before.
        """
        self.wait()
        self._refused = None
        content = Content(Saved(step, self._kind(step), score), _parts(state), progress)
        self._save = Save(self.folder, content, self._arrays, self._saving)
        if self._save.error is not None or not self._saving.asynchronous:
            self.wait()

    def refuse(self, why: str) -> None:
        """Counts a save that cannot even begin as one that the system refused, with the same consequences."""
        self.wait()
        self._failures, self._reason, self._refused = self._failures + 1, why, None
        if process_number() == 0:
            log.error("A CHECKPOINT IS NOT SAVED in %s: %s. The one before it stays.", self.folder, why)
        self._require_few()

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
        """Until the save under way is committed or given up; raises UserError where too many were given up in a row."""
        if self._refused_now():
            self._require_few()

    def close(self) -> None:
        """Waits for the save under way. Where it is given up, and its state is still there, it is tried again with
        pauses; raises UserError where that is of no use."""
        self._refused_now()
        if self._failures:
            self._insist()

    @cached_property
    def _arrays(self) -> ocp.PyTreeCheckpointHandler:
        """Made when it is needed: it starts the devices."""
        return _handler()

    def _restore(
        self, abstract: Mapping[str, Any], *, partial: bool, step: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        path = self._path(self._newest() if step is None else step)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        restored, progress, own = None, None, None
        try:
            restored = self._arrays.restore(path / STATE, args=args)
            progress = json.loads((path / PROGRESS).read_text())
        except Exception as error:  # those of Orbax are of many kinds, with megabytes of text
            own = error
        said = ""
        if own is not None and (unread := system_error(own)):
            said = _UNREAD + str(unread.strerror).lower()
        elif own is not None:
            said = f"{type(own).__name__}: {str(own).partition('[tensorstore')[0][:300]}"
        found = next(filter(None, collected(_TOPIC, said)), "")
        if found := told(_TOPIC, found):
            if found.startswith(_UNREAD):
                raise LostError(
                    f"{path} {found}: nothing was changed, and the same command tries again; if it stays so, mend the "
                    "file system, or move that folder away to go on from the checkpoint before it."
                ) from own
            raise UserError(
                f"{path} is as it was written and does not fit what is to be restored ({' '.join(found.split())}): "
                "use the experiment and the version that wrote it, or begin with its weights alone by start_from."
            ) from own
        return restored, progress or {}

    def _kind(self, step: int) -> Kind:
        if step == self._decay_begins:
            return "before decay"
        return "permanent" if self._permanent is None or self._permanent(step) else "temporary"

    def _refused_now(self) -> bool:
        """Waits for the save under way, where there is one, and says whether it was given up."""
        save, self._save = self._save, None
        if save is None:
            return False
        save.wait(self._alive)
        if save.error is None:
            self.latest, self._failures, self._refused = save.step, 0, None
            self.longest = max(self.longest, save.seconds)
            return False
        if not isinstance(save.error, RefusedError):
            raise save.error
        self._failures, self._reason, self._refused = self._failures + 1, str(save.error), save
        return True

    def _require_few(self) -> None:
        if self._failures >= self._saving.failures:
            self._insist(f" (saving.failures={self._saving.failures})")

    def _insist(self, why: str = "") -> None:
        """Tries the save that was refused last again; raises UserError where it cannot be done."""
        refused = self._refused
        for pause in PAUSES:
            if refused is None or _is_gone(refused.content.parts):
                break
            if process_number() == 0:
                log.warning("step %d is tried again in %g seconds", refused.step, pause)
            self._alive()
            time.sleep(pause)
            self._save = Save(self.folder, refused.content, self._arrays, self._saving)
            if not self._refused_now():
                return
        raise UserError(f"{self._not_saved()}{why}.") from (None if refused is None else refused.error)

    def _not_saved(self) -> str:
        which = "the last checkpoint" if self._failures == 1 else f"the last {self._failures} checkpoints"
        newest = "there is none before" if self.latest is None else f"the newest is of step {self.latest}"
        return (
            f"{which} could not be saved in {self.folder} ({self._reason}): {newest}, and the same command goes on "
            "from there"
        )

    def _newest(self) -> int:
        self.wait()
        if self.latest is None:
            raise UserError(f"{self.folder} holds no sound checkpoint: train the run first.")
        return self.latest

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _sound(self, wanted: Callable[[Saved], bool] = lambda _: True) -> Iterator[int]:
        """The steps of the wanted checkpoints that are as they were written, the newest first, verified as they are
        met; which are wanted, the first process says."""
        steps: list[int] | str = []
        if process_number() == 0:
            try:
                steps = [found.step for found in saved_in(self.folder) if wanted(found)]
            except OSError as error:
                steps = str(error.strerror).lower()
        steps = json.loads(told(_TOPIC, json.dumps(steps)))
        if isinstance(steps, str):
            raise LostError(
                f"{self.folder} could not be read ({steps}): nothing was changed, and the same command tries again."
            )
        return (step for step in reversed(steps) if self._is_sound(step))

    def _is_sound(self, step: int) -> bool:
        """Verifies a checkpoint once; a damaged one is named in the log and, unless `read_only`, renamed."""
        if step in self._verified:
            return self._verified[step]
        path = self._path(step)
        problems = agreed_faults(path, _TOPIC, self._alive)
        if problems and told(_TOPIC, "" if path.is_dir() else "gone"):
            return False  # the run has removed it meanwhile
        if problems and process_number() == 0:
            named = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            log.error("checkpoint %s is damaged (%s): the one before it takes its place", path, named)
            if not self._read_only:
                path.rename(self.folder / f"{step}{_DAMAGED}{time.strftime('%Y%m%dT%H%M%S')}")
        if problems and not self._read_only:
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
    arrays = _handler(type_handler_registry=registry)
    with new_folder(folder.absolute() / str(step)) as unfinished:
        for path in (unfinished / STATE, (unfinished / PROGRESS).parent):
            path.mkdir()
        arrays.save(unfinished / STATE, args=ocp.args.PyTreeSave(leaves_to_write(shapes)))
        arrays.finalize(unfinished / STATE)
        arrays.close()
        (unfinished / PROGRESS).write_text(json.dumps(dict(progress)))
        (unfinished / OF_ORBAX).write_text("{}")
        seal(unfinished)


def _handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Of the arrays in a checkpoint."""
    hide_aftermath()
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False, **options)


def _parts(state: Any) -> dict[str, Any]:
    """The parts of a state by name. One that is None is left out: a state with and without it is then stored alike."""
    parts = state if isinstance(state, Mapping) else {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: part for name, part in parts.items() if part is not None}


def _is_gone(parts: Mapping[str, Any]) -> bool:
    """Whether a step has written to the memory of a state, which it was given for that."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(parts))
