"""Is a run that is killed again and again the run that was left alone, bit for bit?

A tiny model is trained on a corpus of its own: once undisturbed, and then under SIGKILL. Half of the kills come at any
moment of a run, half at a random moment of a phase that is drawn first, so that the short ones, such as saving, are hit
as often as the long ones. A killed run is started again with the same command, until it is complete or all kills are
done; a complete one is compared and the next one begun. Of several processes one is killed, or all are: those that are
left must end by themselves.

Compared are all arrays of the last checkpoint (parameters, optimizer, moving average), the rows read of each source,
all records of training, evaluations and skipped steps but for their times, and the last evaluation and the samples.

    python scripts/chaos.py --kills 100 --processes 2

Prints what was hit, and exits with 1 where anything differs, hangs, or calls a checkpoint damaged.
"""

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.processes import Group, Server, differences, outcome  # noqa: E402

SAVING = "saving in the background"
AT_THE_END = ("evaluating at the end", "writing samples")  # where one may be done when another one is killed
DEVICES = 2  # of each process
LIMIT = 120.0  # seconds that a start, or the end of those that are left, may take

WORDS = {
    "de": "der die und in von zu das mit sich des auf für ist im dem nicht ein eine als auch Straße Übung",
    "el": "και το να του η της με που την από για είναι στο ότι δεν θα τα στην οι μια",
    "mt": "il u ta li fi ma għal hu din kien dan minn jew fuq bħal wara ħafna żewġ ċar ġdid",
}

EXPERIMENT = '''"""Is a run that is killed again and again the run that was left alone?"""

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.skipping import SkipStep

USUAL = Mixture.shares({{"de": 0.5, "el": 0.5}})
UNSEEN = Mixture.shares({{"mt": 1.0}})  # for two steps, whose gradients are spikes and so are skipped

EXPERIMENT = Experiment(
    name="chaos",
    tokenizer="{folder}/tokenizer",
    data=DataConfig(
        store="{folder}/store",
        mixture=USUAL.stage(at_row=128, mixture=UNSEEN).stage(at_row=144, mixture=USUAL),
        sequence_length=32,
    ),
    heldout="{folder}/store",
    model=TransformerConfig(
        vocab_size=400, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=Gated(32), max_positions=160,
        compute="float32", remat="none",
    ),
    schedule=WSD(peak=1e-2, warmup=2),
    steps=30,
    batch_size=8,
    skip=SkipStep(factor=1.6, window=4, at_most=40),
    ema=0.9,
    log_every=3,
    evaluate_every=7,
    evaluate_rows=2,
    checkpoint_every=5,
    saving=Saving(minutes=0.01),
    runs="{runs}",
)
'''


@dataclass
class Found:
    """What the kills have hit, and what came of it."""

    hit: Counter[str] = field(default_factory=Counter)  # phase -> kills
    saving: int = 0  # of all kills, those that left a checkpoint unfinished
    starts: int = 0
    went_on: int = 0  # starts from a checkpoint
    runs: int = 0  # complete, and equal to the undisturbed one
    slowest_end: float = 0.0  # seconds until a process ended that was left


def make_inputs(folder: Path, seed: int) -> None:
    """A corpus in three languages and three scripts, its tokenizer and its store."""
    from eurollm_jax.corpus.preparing.prepare import prepare
    from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer

    (folder / "corpus").mkdir(parents=True)
    for language, words in WORDS.items():
        dice = Random(f"{language} {seed}")
        with (folder / "corpus" / f"{language}.jsonl").open("w") as file:
            for number in range(120):
                text = f"{number}. " + " ".join(dice.choices(words.split(), k=dice.randint(10, 60)))
                file.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")
    tokenizer = train_tokenizer(folder / "corpus", folder / "tokenizer", vocab_size=400)
    prepare(folder / "corpus", tokenizer, folder / "store", workers=1)


def phase_of(name: str) -> str:
    """Without the number of the step; a step is training."""
    return re.sub(r"^step \d+$", "training", name).partition(" after step ")[0]


def stays(group: Group) -> dict[str, list[float]]:
    """Phase -> seconds of each time that a start which nothing disturbed was in it."""
    found = defaultdict(list)
    for (start, name), (end, _) in pairwise([(group.began, "importing"), *group.phases(), (time.time(), "")]):
        found[phase_of(name)].append(end - start)
    return found


def unfinished(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


class Chaos:
    """Trains in `folder` over and over, and kills."""

    def __init__(self, server: Server, folder: Path, processes: int, seed: int) -> None:
        self._server, self._folder, self._processes, self._dice = server, folder, processes, Random(seed)
        self._programs = 0
        self.found = Found()
        self.expected = self._undisturbed("undisturbed")
        if named := differences(self.expected, self._undisturbed("again")):
            raise AssertionError(f"two runs that nothing disturbed differ: {'; '.join(named)}")

    def until_complete(self, run: str, kills: int) -> None:
        """Kills a run again and again, so many times at most, until it is complete; then compares it."""
        last = self.found.hit.total() + kills
        while not self._disturbed(run, last):
            pass
        if named := differences(self.expected, outcome(self._folder / run / "chaos")):
            raise AssertionError(f"{self._folder / run} differs from the undisturbed run: {'; '.join(named)}")
        self.found.runs += 1
        shutil.rmtree(self._folder / run)

    def _start(self, run: str, *, fresh: bool = False, cold: bool = False) -> Group:
        """Cold is a start that finds no program compiled; those that follow find what a kill has left of them."""
        self._programs += cold
        experiment = self._folder / run / "chaos.py"
        if not experiment.exists():
            experiment.parent.mkdir()
            experiment.write_text(EXPERIMENT.format(folder=self._folder, runs=experiment.parent))
        return self._server.start(
            "train",
            experiment,
            processes=self._processes,
            devices=DEVICES,
            environment={"JAX_COMPILATION_CACHE_DIR": str(self._folder / f"programs-{self._programs}")},
            fresh=fresh,
        )

    def _undisturbed(self, run: str) -> dict[str, Any]:
        with self._start(run) as group:
            statuses = group.wait(LIMIT)
            assert set(statuses) == {0}, f"an undisturbed run ended with {statuses}\n{group.last_words()}"
            self._usual, self._whole = stays(group), time.time() - group.began
        return outcome(self._folder / run / "chaos")

    def _disturbed(self, run: str, last: int) -> bool:
        """Starts once, and kills unless there were `last` kills; whether the run is complete."""
        dice, found, checkpoints = self._dice, self.found, self._folder / run / "chaos"
        fresh, cold = dice.random() < 0.1, dice.random() < 0.1
        with self._start(run, fresh=fresh, cold=cold) as group:
            victims: list[int] = []
            if found.hit.total() < last:
                self._await_moment(group, checkpoints, fresh or cold)
                alone = self._processes > 1 and dice.random() < 0.7
                victims = [dice.randrange(self._processes)] if alone else list(range(self._processes))
                group.signal(signal.SIGKILL, *victims)
            killed, saving = time.monotonic(), unfinished(checkpoints)
            statuses = group.wait(LIMIT)
            hit = [index for index in victims if statuses[index] == -signal.SIGKILL]
            left = [status for index, status in enumerate(statuses) if index not in victims]
            phases = group.phases(hit[0] if hit else 0)
            found.starts += 1
            found.went_on += next((name for _, name in phases if name.startswith("step ")), "step 1") != "step 1"
            for index in range(self._processes):
                assert "damaged" not in group.said(index), f"a kill has damaged a checkpoint\n{group.last_words()}"
            if not hit:
                assert set(statuses) == {0}, f"a start that was not killed ended with {statuses}\n{group.last_words()}"
                return True
            phase = phase_of(phases[-1][1]) if phases else "importing"
            found.hit[phase] += 1
            found.saving += saving
            if left:
                assert 0 not in left or phase in AT_THE_END, (
                    f"process {hit[0]} was killed, others ended well: {statuses}\n{group.last_words()}"
                )
                found.slowest_end = max(found.slowest_end, time.monotonic() - killed)
            return False

    def _await_moment(self, group: Group, run: Path, slow: bool) -> None:
        """Returns at a random moment, or when a process has ended."""
        dice, end = self._dice, time.monotonic() + LIMIT
        if dice.random() < 0.5 or slow:
            end = min(end, time.monotonic() + dice.uniform(0, self._whole * (3 if slow else 1)))
            while time.monotonic() < end and None in group.statuses():
                time.sleep(0.002)
            return
        wanted = dice.choice([*sorted(self._usual), SAVING])
        usual = self._usual.get(wanted, [0.05] * 3)
        nth, within = dice.randint(1, min(3, len(usual))), dice.uniform(0, max(usual))
        seen, was = 0, False
        while time.monotonic() < end and None in group.statuses():
            if wanted == SAVING:
                now = unfinished(run)
                seen, was = seen + (now and not was), now
            elif wanted == "importing":
                seen = nth
            else:
                seen = sum(phase_of(name) == wanted for _, name in group.phases())
            if seen >= nth:
                time.sleep(within)
                return
            time.sleep(0.002)


def table(found: Found) -> str:
    """What was hit, for people."""
    rows = [("hit while", "kills"), *((phase, str(kills)) for phase, kills in found.hit.most_common())]
    rows += [("", ""), ("of all, with a checkpoint half written", str(found.saving)), ("all", str(found.hit.total()))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {kills:>5}" for name, kills in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="an empty folder to work in, which is kept (default: in memory)")
    arguments = parser.parse_args(argv)
    memory = Path("/dev/shm")  # SIGKILL loses no written page
    folder = arguments.run or Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if memory.is_dir() else None))
    folder = folder.absolute()
    make_inputs(folder, arguments.seed)
    (folder / "logs").mkdir()
    begin = time.monotonic()
    try:
        with Server(folder / "logs") as server:
            chaos = Chaos(server, folder, arguments.processes, arguments.seed)
            found = chaos.found
            while found.hit.total() < arguments.kills:
                chaos.until_complete(f"run-{found.runs}", arguments.kills - found.hit.total())
    except AssertionError as error:
        print(f"{error}\n\nFAILED; all of it is in {folder}", file=sys.stderr)
        return 1
    if arguments.run is None:
        shutil.rmtree(folder)
    print(table(found))
    records = Counter(line["kind"] for line in chaos.expected["records"])
    print(
        f"{found.runs} runs of {arguments.processes} x {DEVICES} devices, complete after {found.starts} starts, "
        f"{found.went_on} of them from a checkpoint, in {time.monotonic() - begin:.0f} s: all arrays and all records "
        f"({', '.join(f'{count} {kind}' for kind, count in records.items())}) are those of the undisturbed run, bit "
        "for bit."
    )
    if arguments.processes > 1:
        print(f"Processes that were left ended by themselves within {found.slowest_end:.1f} s.")
    summary = {"kills": found.hit.total(), "saving": found.saving, "runs": found.runs, "went_on": found.went_on}
    print(json.dumps(summary | {"hit": found.hit, "records": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
