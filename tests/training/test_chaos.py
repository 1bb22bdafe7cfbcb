"""A run that is killed again and again is the run that was left alone. `scripts/chaos.py` does the killing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.chaos import AT_THE_END

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos.py"


def run_chaos(kills, processes):
    command = [sys.executable, SCRIPT, "--kills", kills, "--processes", processes, "--seed", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["runs"] >= 1
    assert found["records"].keys() == {"train", "evaluation", "skipped"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hundred_kills_hit_every_phase_and_change_nothing(processes):
    found = run_chaos(100, processes)
    assert found["went_on"] >= 20
    assert found["saving"] >= 5  # with a checkpoint half written
    phases = {"importing", "restoring", "compiling", "training", "evaluating", "saving", *AT_THE_END}
    assert len(phases - found["hit"].keys()) <= 1, "chance may spare one of them, not more"
