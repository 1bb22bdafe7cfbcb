"""A study whose process is killed at its worst moments finds what an undisturbed one finds; and its arms read the same
rows of a source in the same order, whatever else they read."""

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from eurollm_jax.ablation.prepared import prepare
from eurollm_jax.ablation.study import Analysis, Confirmation, Design
from eurollm_jax.data.loader import open_data
from tests.processes import flags

SCRIPT = """
import os
import signal
import sys
from pathlib import Path

import eurollm_jax.ablation.run as run
import eurollm_jax.training.ensemble as ensemble
from eurollm_jax.ablation.study import *
from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.experiment import *
from eurollm_jax.model.config import *

point = sys.argv[1]
add_measurements = ensemble.add_measurements


def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)


def adding(folder, measured):
    phase = "confirmation" if "confirmation" in str(folder) else "proxies"
    when = "end" if measured[0].complete else f"step {{measured[0].step}}"
    if point == f"before {{when}} of {{phase}}":
        die()
    add_measurements(folder, measured)
    if point == f"after {{when}} of {{phase}}":
        die()


ensemble.add_measurements = adding
if point == "after the table":
    run.analyse = die
if point == "before the report":
    run.write_report = die
run.ablate({study!r}, "Which?")
"""

POINTS = {  # what is there when the process is killed, of the study's files
    "after step 6 of proxies": set(),  # its checkpoint would be next
    "before end of proxies": set(),
    "after the table": {"results.parquet"},
    "after step 6 of confirmation": {"results.parquet", "findings.json", "mixture.py"},
    "after end of confirmation": {"results.parquet", "findings.json", "mixture.py"},
    "before the report": {"results.parquet", "findings.json", "mixture.py", "confirmation.json"},
}
FILES = {"results.parquet", "findings.json", "mixture.py", "confirmation.json", "report.html"}


def contents(folder):
    """All that a study has found."""
    return {
        "table": pq.read_table(folder / "results.parquet").to_pylist(),
        "findings": json.loads((folder / "findings.json").read_text()),
        "confirmation": json.loads((folder / "confirmation.json").read_text()),
        "mixture": (folder / "mixture.py").read_text(),
    }


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_finds_what_an_undisturbed_one_does(study, tmp_path):
    model = replace(study.proxy.model, width=32, heads=4, kv_heads=4)
    larger = replace(study.proxy, name="larger", steps=9, model=model)
    whole = replace(
        study,
        design=Design(draws=8, candidates=4, prior_runs=2),
        analysis=Analysis(bootstraps=10, folds=2, starts=1),
        confirmation=Confirmation(larger, seeds=2, when_declined=True),
        at_once=5,
    )
    environment = os.environ | {
        "XLA_FLAGS": flags(1),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def ablated(folder, point):
        script = tmp_path / f"{folder}.py"
        asked = replace(whole, studies=str(tmp_path / folder))
        script.write_text(SCRIPT.format(study=asked))
        command = [sys.executable, str(script), point]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr[-3000:], asked.folder

    status, said, undisturbed = ablated("undisturbed", "")
    assert status == 0, said
    for point, there in POINTS.items():
        status, said, killed = ablated("killed", point)
        assert status == -signal.SIGKILL, f"{point}: {said}"
        assert {name for name in FILES if (killed / name).exists()} >= there
        assert not (killed / "report.html").exists()
    status, said, killed = ablated("killed", "")
    assert status == 0, said
    assert contents(killed) == contents(undisturbed)
    assert (killed / "report.html").is_file()


def rows_by_source(experiment):
    """The bytes of each source's rows, in the order in which the run reads them."""
    data, total = open_data(experiment.data, experiment.total_rows), experiment.total_rows
    batch = data.batch(0, total)
    found = defaultdict(list)
    for place in np.argsort(data.order.batch_rows(0, total)):
        row = [np.asarray(field[place]) for field in batch]
        found[data.source_names[row[-1]]].append(b"".join(field.tobytes() for field in row))
    return found


def test_a_group_less_changes_no_byte_of_what_is_read_of_the_others(study):
    design = Design(draws=4, candidates=1, prior_runs=2, leave_one_out=True)
    proxies = {arm.name: experiment for arm, experiment in prepare(replace(study, design=design)).proxies}
    prior, without = (rows_by_source(proxies[name]) for name in ("prior-0", "without-South"))
    assert prior.keys() - without.keys() == {"el", "mt"}
    assert without.keys() == {"bg", "de", "en"}
    for name, rows in without.items():
        both = min(len(rows), len(prior[name]))
        assert both >= 8
        assert rows[:both] == prior[name][:both]
    assert sum(map(len, without.values())) == sum(map(len, prior.values())) == 96


def test_a_pair_of_the_confirmation_reads_one_order_and_another_pair_another(study):
    confirmation = Confirmation(replace(study.proxy, name="larger"), seeds=2)
    prepared = prepare(replace(study, design=Design(draws=6), confirmation=confirmation))
    other = np.array([0.5, 0.3, 0.2])
    prior, proposal = (
        [rows_by_source(run) for run in prepared.confirming(name, shares.tolist())]
        for name, shares in (("prior", prepared.space.prior), ("proposal", other))
    )
    for name, rows in prior[0].items():
        both = min(len(rows), len(proposal[0][name]))
        assert rows[:both] == proposal[0][name][:both]
        assert both < 4 or rows[:both] != proposal[1][name][:both]
    assert max(min(len(rows), len(proposal[1][name])) for name, rows in prior[0].items()) >= 4
