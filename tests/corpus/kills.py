"""Kills `prepare` at random moments until a number of kills is reached; run by test_prepare_kills.py.

A server imports everything once and forks children, so that a kill costs milliseconds and not the start of a Python.
Each child is the real thing: it prepares a store or does one task of two, alone or beside another one,
and is sent SIGKILL at a random moment. Whenever a store has become whole it is compared with an undisturbed one, byte
for byte, and the next one is begun.

Usage: python kills.py CORPUS TOKENIZER FOLDER KILLS SEED. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from eurollm_jax.corpus.preparing import work_plan
from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare, prepare_task
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

OPTIONS = PrepareOptions(deduplicate=True)
BESIDE_ANOTHER = (
    "another process",
    "there is no work at",
    "is there already",
    "was removed meanwhile",
    "lacks",
    "meanwhile; use that",
)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(act, alone):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            act()
        status = 0
    except UserError as error:
        status = 0 if not alone and any(words in str(error) for words in BESIDE_ANOTHER) else 1
        if status:
            os.write(2, f"{error}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def phase(out, units):
    """Where the work stands on disk, which is where the kill hit."""
    work = out.with_name(f"{out.name}.parts")
    if out.exists():
        return "done, work not removed" if work.exists() else "done"
    if not work.exists():
        return "before the plan"
    done = sum(not entry.name.startswith(".") for entry in (work / "units").iterdir())
    if done < units:
        return "units"
    partial = [path for path in out.parent.glob(f".{out.name}.*.partial") if not path.name.startswith(f".{work.name}.")]
    return "merging" if partial else "between units and merging"


def main(corpus, model, folder, kills, seed):
    work_plan.UNIT_BYTES = (20_000, 20_000)
    tokenizer, dice = Tokenizer.load(model), Random(seed)
    tokenizer.encode_batch(["warm"])
    out, undisturbed = folder / "out", folder / "undisturbed"
    start = time.monotonic()
    child_pid = child(lambda: prepare(corpus, tokenizer, undisturbed, OPTIONS, workers=1), True)
    assert os.waitpid(child_pid, 0)[1] == 0
    whole, expected = time.monotonic() - start, tree(undisturbed)
    units = len(work_plan.make_plan([corpus], tokenizer, out, OPTIONS).units)

    killed = stores = 0
    phases = Counter()
    acts = [
        lambda: prepare(corpus, tokenizer, out, OPTIONS, workers=1),
        lambda: prepare_task(corpus, tokenizer, out, OPTIONS, task=0, of=2, workers=1),
        lambda: prepare_task(corpus, tokenizer, out, OPTIONS, task=1, of=2, workers=1),
    ]
    while True:
        several = 1 if dice.random() < 0.7 else 2
        pids = [child(dice.choices(acts, (4, 1, 1))[0], several == 1) for _ in range(several)]
        if killed < kills:  # then let the last store become whole
            time.sleep(dice.uniform(0, whole) if dice.random() < 0.3 else dice.uniform(0, 0.15 * whole))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                killed += 1
                phases[phase(out, units)] += 1
            assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), "a child failed"
        if out.exists():
            prepare(corpus, tokenizer, out, OPTIONS, workers=1)  # finds it, and clears away what a kill left
            stores += 1
            assert tree(out) == expected, "a store differs from the undisturbed one"
            left = sorted(path.name for path in folder.iterdir())
            assert left == ["out", "undisturbed"], f"left behind: {left}"
            shutil.rmtree(out)
            if killed >= kills:
                break
    print(
        json.dumps(
            {
                "seconds_undisturbed": round(whole, 2),
                "kills": killed,
                "stores": stores,
                "units": units,
                "phases": phases,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
