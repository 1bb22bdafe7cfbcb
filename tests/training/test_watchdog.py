"""Processes that hang for real, in Python and in a library that holds the interpreter."""

import logging
import os
import subprocess
import sys
import time

import pytest

from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.training.watchdog import Watch, Watchdog

HANGING = """
import ctypes, sys, threading
from pathlib import Path
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.training import watchdog

watchdog.GRACE_SECONDS = watchdog.WRITE_SECONDS = 1.0

def waits_for_what_never_comes():
    if sys.argv[2] == "python":
        threading.Event().wait(100)
    ctypes.PyDLL(None).sleep(100)  # does not let go of the interpreter

with RollCall() as roll, watchdog.Watchdog(watchdog.Watch(minutes=2 / 60), roll) as dog:
    if sys.argv[3] == "run":
        dog.keep(Path(sys.argv[1]))
    dog.phase("step 12")
    print("begun", flush=True)
    waits_for_what_never_comes()
"""


@pytest.mark.parametrize("where", ["python", "library"])
@pytest.mark.parametrize("since", ["start", "run"])
def test_a_hang_ends_the_run_and_shows_where_it_was(tmp_path, where, since):
    command = [sys.executable, "-c", HANGING, str(tmp_path), where, since]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ)
    assert process.stdout == "begun\n"
    assert process.returncode == 76
    stacks = tmp_path / "logs" / "stacks-0.txt"
    if since == "run":
        assert "in waits_for_what_never_comes" in stacks.read_text()
    else:
        assert not list(tmp_path.iterdir())
    if where == "python" or since == "start":
        assert "in waits_for_what_never_comes" in process.stderr
    if where == "python":
        line = process.stderr.strip().splitlines()[-1]
        assert line.startswith("no progress for 0.0333333 minutes at: step 12, since ")
        assert line.endswith(f"threads are in {stacks}." if since == "run" else "threads are in its standard error.")


WITHOUT_A_WAY_OUT = """
import logging, os, sys, threading
from eurollm_jax.parallel import liveness
from eurollm_jax.parallel.liveness import RollCall

def full_pipe():
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(1 << 16))
    except BlockingIOError:
        os.set_blocking(write, True)
    return write

def stuck():
    os.write(full_pipe(), b"?")

liveness.HOOK_SECONDS, liveness.FORCE_SECONDS = 1.0, 3.0
with RollCall() as roll:
    roll.on_end = lambda line: print(line, flush=True)
    if sys.argv[1] == "log":
        logging.getLogger("eurollm_jax").addHandler(logging.StreamHandler(os.fdopen(full_pipe(), "w")))
    elif sys.argv[1] == "stderr":
        os.dup2(full_pipe(), 2)
    else:
        roll.on_hang = stuck
    threading.Thread(target=roll.hang, args=("no progress.",)).start()
    threading.Event().wait(100)
"""


@pytest.mark.parametrize("what", ["log", "stderr", "stacks"])
def test_what_blocks_for_ever_does_not_keep_a_run_from_its_end(what):
    command = [sys.executable, "-c", WITHOUT_A_WAY_OUT, what]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ)
    assert process.returncode == 76, process.stderr
    assert process.stdout == "no progress.\n"
    assert process.stderr == ("" if what == "stderr" else "no progress.\n")


def test_progress_keeps_a_run_alive(tmp_path, caplog):
    """For several times the limit, by phases and within one; and nothing is left of it."""
    with (
        caplog.at_level(logging.DEBUG, logger="eurollm_jax.phases"),
        RollCall() as roll,
        Watchdog(Watch(minutes=2 / 60), roll) as dog,
    ):
        dog.keep(tmp_path)
        for step in range(6):
            dog.phase(f"step {step}")
            time.sleep(0.5)
        for _ in range(6):
            dog.alive()
            time.sleep(0.5)
    assert [record.getMessage() for record in caplog.records] == [f"PHASE step {step}" for step in range(6)]
    assert list((tmp_path / "logs").iterdir()) == []


def test_stacks_that_cannot_be_removed_do_not_hide_why_a_run_ended(tmp_path):
    def ended():
        with RollCall() as roll, Watchdog(Watch(), roll) as dog:
            dog.keep(tmp_path)
            (tmp_path / "logs" / "stacks-0.txt").unlink()
            raise StoppedError("all is saved.")

    with pytest.raises(StoppedError, match="all is saved"):
        ended()


def test_without_minutes_nothing_is_watched(tmp_path):
    with RollCall() as roll, Watchdog(Watch(minutes=None), roll) as dog:
        dog.keep(tmp_path)
        dog.phase("step 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["minutes", "replicas_every"])
def test_a_watch_of_nothing_is_refused(field):
    with pytest.raises(UserError, match=f"watch: {field}=0 must be"):
        Watch(**{field: 0})


def test_replicas_are_compared_every_so_many_steps_and_before_every_checkpoint():
    often, never = Watch(replicas_every=4), Watch(replicas_every=None)
    steps = range(1, 10)
    assert [step for step in steps if often.compares_replicas(step, saving=step == 6)] == [4, 6, 8]
    assert not any(never.compares_replicas(step, saving=step == 6) for step in steps)
