"""Processes that hang for real, in Python and in a library that holds the interpreter."""

import logging
import os
import subprocess
import sys
import time

import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.training.watchdog import Watch, Watchdog

HANGING = """
import ctypes, sys, threading
from pathlib import Path
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.training import watchdog

watchdog.GRACE_SECONDS = 1.0

def waits_for_what_never_comes():
    if sys.argv[2] == "python":
        threading.Event().wait(100)
    ctypes.PyDLL(None).sleep(100)  # does not let go of the interpreter

with RollCall() as roll, watchdog.Watchdog(watchdog.Watch(minutes=2 / 60), Path(sys.argv[1]), roll) as dog:
    dog.phase("step 12")
    print("begun", flush=True)
    waits_for_what_never_comes()
"""


@pytest.mark.parametrize(("where", "status"), [("python", 76), ("library", 1)])
def test_a_hang_ends_the_run_and_shows_where_it_was(tmp_path, where, status):
    command = [sys.executable, "-c", HANGING, str(tmp_path), where]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ)
    assert process.stdout == "begun\n"
    assert process.returncode == status
    stacks = (tmp_path / "logs" / "stacks-0.txt").read_text()
    assert "in waits_for_what_never_comes" in stacks
    if where == "python":
        assert "in waits_for_what_never_comes" in process.stderr
        line = process.stderr.strip().splitlines()[-1]
        assert line.startswith("no progress for 0.0333333 minutes at: step 12, since ")
        assert str(tmp_path / "logs" / "stacks-0.txt") in line


def test_progress_keeps_a_run_alive(tmp_path, caplog):
    """For several times the limit, by phases and within one; and nothing is left of it."""
    with (
        caplog.at_level(logging.DEBUG, logger="eurollm_jax.phases"),
        RollCall() as roll,
        Watchdog(Watch(minutes=2 / 60), tmp_path, roll) as dog,
    ):
        for step in range(6):
            dog.phase(f"step {step}")
            time.sleep(0.5)
        for _ in range(6):
            dog.alive()
            time.sleep(0.5)
    assert [record.getMessage() for record in caplog.records] == [f"PHASE step {step}" for step in range(6)]
    assert list((tmp_path / "logs").iterdir()) == []


def test_without_minutes_nothing_is_watched(tmp_path):
    with RollCall() as roll, Watchdog(Watch(minutes=None), tmp_path, roll) as dog:
        dog.phase("step 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["minutes", "replicas_every"])
def test_a_watch_of_nothing_is_refused(field):
    with pytest.raises(UserError, match=f"watch: {field}=0 must be"):
        Watch(**{field: 0})


def test_replicas_are_compared_every_so_many_steps_and_before_a_permanent_checkpoint():
    often, never = Watch(replicas_every=4), Watch(replicas_every=None)
    steps = range(1, 10)
    assert [step for step in steps if often.compares_replicas(step, permanent=step == 6)] == [4, 6, 8]
    assert not any(never.compares_replicas(step, permanent=step == 6) for step in steps)
