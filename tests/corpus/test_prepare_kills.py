"""SIGKILL at any moment of preparing costs time and nothing else. `kills.py` does the killing."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

KILLS = int(os.environ.get("EUROLLM_KILLS", "15"))


def run_kills(corpus_dir, tokenizer, kills):
    # In memory where there is such a folder: SIGKILL loses no written page, and unlinking is what takes the time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        script = Path(__file__).with_name("kills.py")
        command = [sys.executable, script, corpus_dir, tokenizer.model_path, folder, kills, 7]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] >= kills
    assert found["stores"] >= 1
    return found


def test_prepare_that_is_killed_again_and_again_loses_and_duplicates_nothing(corpus_dir, tokenizer):
    run_kills(corpus_dir, tokenizer, KILLS)


@pytest.mark.slow
def test_a_thousand_kills_hit_every_phase_and_lose_and_duplicate_nothing(corpus_dir, tokenizer):
    found = run_kills(corpus_dir, tokenizer, 1000)
    assert {"before the plan", "units", "merging"} <= found["phases"].keys()
