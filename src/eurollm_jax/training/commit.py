"""One save: the files of all processes, written in the background, become a checkpoint in one rename, or nothing.

Until the rename there is a folder `STEP.orbax-checkpoint-tmp`, which is no checkpoint. The processes go through the
stages of a save together, by texts (parallel/messages.py): where one fails, all give it up, and none waits in vain.
"""

import asyncio
import errno
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]

from eurollm_jax.corpus.folders import discard_folder
from eurollm_jax.parallel.messages import collected, process_number, processes, told
from eurollm_jax.training.manifest import Alive, agreed_hashes, sync, sync_tree, write_manifest
from eurollm_jax.training.saving import KINDS, Saved, Saving, kept
from eurollm_jax.training.weights import STATE, save_args, system_error

log = logging.getLogger(__name__)
# Where a write or a read fails, Orbax logs pages of traceback. What failed is raised, and said in one line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))

ABOUT = "about.json"  # what a rule for keeping checkpoints has to know of one
PROGRESS = "progress/metadata"  # where Orbax keeps a JSON object
OF_ORBAX = "_CHECKPOINT_METADATA"  # Orbax warns at a restore of its own where it is missing; nothing here reads it
UNFINISHED = ".orbax-checkpoint-tmp"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOPIC = "saving"

_EACH = 1.0  # seconds between two looks at whether a save goes on

_running: dict[Path, Thread] = {}  # folder -> what writes there, even after an error has ended the training


class RefusedError(Exception):
    """The system would not write: there is no room, or a file system fails. A later save may go through."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold."""

    saved: Saved
    parts: Mapping[str, Any]  # of the state, by name
    progress: Mapping[str, Any]


class Save:
    """A save under way, by an Orbax handler for the arrays. Once it is committed, what the rule does not keep goes."""

    def __init__(self, folder: Path, content: Content, arrays: Any, rule: Saving) -> None:
        """Copies the state, or finds that there is no room for it, and returns; the files follow."""
        self.step, self.content = content.saved.step, content
        self.error: Exception | None = None
        self.seconds = 0.0  # from here to the commit
        self._began = time.perf_counter()
        self._folder, self._arrays, self._rule = folder, arrays, rule
        self._thread: Thread | None = None
        self._read = 0  # files, to be hashed
        self._unfinished = folder / f"{self.step}{UNFINISHED}"
        refused = told(_TOPIC, self._begin() if process_number() == 0 else "")
        if refused:
            self._give_up(RefusedError(refused))
            return
        commits: Sequence[Any] = ()
        error = None
        try:
            commits = _copied(arrays, self._unfinished / STATE, content.parts)
        except Exception as raised:  # the others learn of it in the first stage
            error = raised
        self._thread = Thread(target=self._run, args=(commits, error), name=f"saving step {self.step}")
        _running[folder] = self._thread
        self._thread.start()

    def wait(self, alive: Alive = lambda: None) -> None:
        """Until it is committed or given up; `error` says which. `alive` is called while files are hashed."""
        read = 0
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_EACH)
            if read != self._read:
                read = self._read
                alive()

    def _begin(self) -> str:
        """Makes the folder; what speaks against it."""
        clear_unfinished(self._folder)
        try:
            needed, free = _bytes(self.content.parts), shutil.disk_usage(self._folder).free
            if needed > free:
                return f"{_size(needed)} are needed and {_size(free)} are free"
            for path in (self._unfinished, self._unfinished / STATE, (self._unfinished / PROGRESS).parent):
                path.mkdir()
        except OSError as error:
            return _said(error)
        return ""

    def _run(self, commits: Sequence[Any], error: Exception | None) -> None:
        try:
            self._together(lambda: self._written(commits, error))
            self._together(self._merged, first_alone=True)
            hashes = agreed_hashes(self._unfinished, _TOPIC, self._has_read)
            self._together(lambda: self._renamed(hashes), first_alone=True)
        except Exception as raised:
            self._give_up(raised)
            return
        self.seconds = time.perf_counter() - self._began
        if process_number() == 0:
            try:
                for step in removable(self._folder, self._rule):
                    remove(self._folder / str(step))
            except OSError as error:
                log.warning("what is old in %s stays for now: %s", self._folder, _said(error))

    def _has_read(self) -> None:
        self._read += 1

    def _written(self, commits: Sequence[Any], error: Exception | None) -> None:
        """All that this process writes of the state is on its disk, as far as it can tell."""
        if error is not None:
            raise error
        for commit in commits:
            commit.result()
        for own in (self._unfinished / STATE).glob(f"*.process_{process_number()}"):
            sync_tree(own)

    def _merged(self) -> None:
        self._arrays.finalize(self._unfinished / STATE)
        saved = self.content.saved
        about = {"step": saved.step, "kind": saved.kind, "score": saved.score}
        (self._unfinished / ABOUT).write_text(json.dumps(about) + "\n")
        (self._unfinished / PROGRESS).write_text(json.dumps(dict(self.content.progress)))
        (self._unfinished / OF_ORBAX).write_text("{}")

    def _renamed(self, hashes: Mapping[str, str]) -> None:
        write_manifest(self._unfinished, hashes)
        sync_tree(self._unfinished)
        self._unfinished.rename(self._folder / str(self.step))
        sync(self._folder)

    def _together(self, stage: Callable[[], None], *, first_alone: bool = False) -> None:
        """Does this process's part of a stage; raises in all of them where one has failed."""
        answer, own = {"said": "", "refused": True}, None
        if process_number() == 0 or not first_alone:
            try:
                stage()
            except Exception as error:
                refused = system_error(error)
                answer, own = {"said": _said(refused or error), "refused": refused is not None}, error
        answers = [answer] if first_alone else [json.loads(text) for text in collected(_TOPIC, json.dumps(answer))]
        failed = [(process, answer) for process, answer in enumerate(answers) if answer["said"]]
        verdict = json.loads(told(_TOPIC, json.dumps(_verdict(failed) if process_number() == 0 else {})))
        if not verdict:
            return
        if verdict["refused"]:
            raise RefusedError(verdict["said"]) from own
        raise own or RuntimeError(verdict["said"])

    def _give_up(self, error: Exception) -> None:
        self.error = error
        if process_number() == 0:
            clear_unfinished(self._folder)
            why = error if isinstance(error, RefusedError) else _said(error)
            log.error("CHECKPOINT %s IS NOT SAVED: %s. The one before it stays.", self._folder / str(self.step), why)
            log.debug("what was raised", exc_info=error)


def settle(folder: Path) -> None:
    """Until no save of this process is under way in a folder: another start may follow on an error at once."""
    if thread := _running.pop(folder, None):
        thread.join()


def clear_unfinished(folder: Path) -> None:
    """Deletes what killed or failed saves have left, and what killed processes were deleting."""
    for pattern in (f"*{UNFINISHED}*", ".*.discarded"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint as a whole; what hinders that is said, and costs nothing but room."""
    try:
        discard_folder(checkpoint)
    except OSError as error:
        log.warning("%s could not be removed: %s", checkpoint, _said(error))


def saved_in(folder: Path) -> list[Saved]:
    """The checkpoints of a folder, sound or not, the newest last. One that says nothing of itself is permanent.

    Raises OSError where the folder is there and cannot be listed, which is not as if it were empty.
    """
    try:
        steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    except FileNotFoundError:
        return []
    return [_about(folder, step) for step in steps]


def removable(folder: Path, rule: Saving) -> list[int]:
    """The steps of the checkpoints that the rule does not keep."""
    saved = saved_in(folder)
    staying = kept(saved, rule)
    return [found.step for found in saved if found.step not in staying]


def _about(folder: Path, step: int) -> Saved:
    try:
        about = json.loads((folder / str(step) / ABOUT).read_text())
        kind, score = about["kind"], about["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return Saved(step)
    if kind not in KINDS or not isinstance(score, float | None):
        return Saved(step)
    return Saved(step, kind, score)


@cache
def hide_aftermath() -> None:
    """Where a write or a read fails, Orbax ends the event loop that all others report to, which Python would tell of
    hundreds of times, from before the error is raised here."""
    before = sys.unraisablehook

    def without_aftermath(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        ended = unraisable.object is None and str(error) == "Event loop is closed"
        dropped = error is not None and isinstance(error.__cause__, GeneratorExit)
        if not ended and not dropped:
            before(unraisable)

    sys.unraisablehook = without_aftermath


def _copied(arrays: Any, folder: Path, parts: Mapping[str, Any]) -> Sequence[Any]:
    """Has Orbax copy a state; what it returns is done when the files are written."""
    args = ocp.args.PyTreeSave(dict(parts), save_args=save_args(parts))
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: a notebook's has a loop that runs already
        return pool.submit(lambda: asyncio.run(arrays.async_save(epath.Path(folder), args=args)) or ()).result()


def _bytes(parts: Mapping[str, Any]) -> int:
    """That a state takes on disk at most: all of it once, and what describes it."""
    return int(1.02 * sum(leaf.nbytes for leaf in jax.tree.leaves(parts))) + (1 << 20)


def _verdict(failed: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    if not failed:
        return {}
    process, answer = failed[0]
    where = f"process {process}: " if processes() > 1 else ""
    return {"said": where + answer["said"], "refused": all(other["refused"] for _, other in failed)}


def _said(error: BaseException) -> str:
    """In few words: those of tensorstore are many."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = str(error.strerror).lower()
        return f"there is no room ({reason}); free some space or quota" if error.errno in NO_ROOM else reason
    return f"{type(error).__name__}: {str(error).partition('[tensorstore')[0][:300]}"


def _size(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
