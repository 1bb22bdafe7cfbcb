"""`eurollm launch` on the command line: what it makes of a training run, a study and a corpus, and what it refuses."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eurollm_jax.ablation.study import Design
from eurollm_jax.cluster import site_files
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import claim_run
from eurollm_jax.parallel.hardware import CHIPS_BY_NAME
from eurollm_jax.training.checkpoint import write_checkpoint
from eurollm_jax.training.inputs import open_inputs
from tests.ablation.conftest import heldout, study  # noqa: F401
from tests.cli.conftest import _imports_of_experiments, refuse, run_command  # noqa: F401
from tests.cluster.fake_slurm.cluster import Cluster
from tests.cluster.test_launch_scripts import CPU
from tests.processes import flags, write_experiment

SLOW_IMPORTS = ("jax", "numpy", "tyro", "orbax")


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    monkeypatch.setattr(site_files, "site_of", lambda name: SITES[name])
    return tmp_path


PAYED = dataclasses.replace(CPU, name="payed", account=True)
LOCAL = dataclasses.replace(CPU, name="local", scheduler="none")
GPU = dataclasses.replace(CPU, name="gpu", chip=CHIPS_BY_NAME["H100"])
SITES = {site.name: site for site in (CPU, PAYED, LOCAL, GPU)}


@pytest.fixture
def file(study, at_work):  # noqa: F811
    return write_experiment(study.proxy, at_work)


@pytest.fixture
def study_file(study, at_work):  # noqa: F811
    """Eight proxies, as many as a law of three groups needs."""
    path = write_experiment(study.proxy, at_work)
    study = dataclasses.replace(study, design=Design(draws=6, candidates=4, prior_runs=2))
    text = path.read_text() + "from eurollm_jax.ablation.study import *\n" + f"STUDY = {study!r}\n"
    path.write_text(text)
    return path


def steps_of(script):
    """What follows the program, as bash would divide it, and the directives by name."""
    joined = script.replace("\\\n", " ")
    (step,) = [line for line in joined.splitlines() if line.startswith("srun ")]
    words = shlex.split(step.removesuffix("|| status=$?"))
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
    )
    return words[words.index("eurollm_jax") + 1 :], options


def test_a_run_is_launched_with_options_before_and_after_its_file(at_work, file, study, monkeypatch):  # noqa: F811
    monkeypatch.delenv("PYTHONPATH", raising=False)
    first = run_command("launch", "--site", "test", "--nodes", 2, file, "--steps", 5, "--time", "02:00:00", "--dry-run")
    assert (first.status, first.err) == (0, "")
    other_order = ("--dry-run", "--site", "test", "--steps", 5, "--nodes", 2, "--time=02:00:00")
    assert first == run_command("launch", "train", file, *other_order)
    words, options = steps_of(first.out)
    assert words == ["train", "--time-limit", "$time_limit", str(file), "--steps", "5"]
    assert (options["nodes"], options["ntasks-per-node"], options["cpus-per-task"]) == ("2", "2", "2")
    assert (options["time"], options["job-name"]) == ("02:00:00", "proxy")
    assert "2 nodes x 2 processes x 1 device, 5 steps." in first.out
    assert f"\ncheckpoints={study.proxy.run}/checkpoints\n" in first.out
    assert "\nunset PYTHONPATH\n" in first.out
    monkeypatch.setenv("PYTHONPATH", "packages:/b")
    again = run_command("launch", "--site", "test", file, "--dry-run")
    assert f"\nexport PYTHONPATH={at_work}/packages:/b\n" in again.out
    changed = run_command("launch", file, "--site", "test", "--dry-run", "--accept-changes", "--job-name", "other")
    assert steps_of(changed.out)[0][:2] == ["train", "--accept-changes"]
    assert steps_of(changed.out)[1]["job-name"] == "other"


def test_a_run_needs_devices_that_its_mesh_and_its_batches_divide_over(at_work, file):
    plain = ("launch", file, "--site", "test", "--dry-run")
    assert "needs a multiple of 3 devices, and there are 4" in refuse(at_work, *plain, "--nodes", 2, "--mesh.fsdp", 3)
    assert "a batch of 8 rows does not divide over 16 devices" in refuse(at_work, *plain, "--nodes", 8)
    assert "tokenizer=nowhere does not exist" in refuse(at_work, *plain, "--tokenizer", "nowhere")
    assert "--nodes 0: take 1 or more" in refuse(at_work, *plain, "--nodes", 0)
    assert "may have 8" in refuse(at_work, *plain, "--nodes", 16, "--batch-size", 32)
    assert "--restarts -1: take 0 or more" in refuse(at_work, *plain, "--restarts", -1)
    assert "--nodes 4 is of a training run" in refuse(at_work, "launch", "--nodes", 4, "study", file, "--site", "test")
    assert "does not exist: give the path of an image" in refuse(at_work, *plain, "--container", "no.sif")
    assert "there is no squeue here" in refuse(at_work, *plain[:-1])
    at = ("launch", file, "--dry-run", "--site")
    assert "which project pays" in refuse(at_work, *at, "payed")
    assert f"run it here: eurollm train {file} --steps 3" in refuse(at_work, *at, "local", "--steps", 3)


def test_what_training_would_refuse_at_its_start_is_refused_before_it_waits(at_work, study):  # noqa: F811
    def said(**changed):
        path = write_experiment(dataclasses.replace(study.proxy, **changed), at_work)
        return refuse(at_work, "launch", path, "--site", "test", "--dry-run")

    proxy = study.proxy
    small = dataclasses.replace(proxy.model, vocab_size=64)
    assert "exceed the run's 12" in said(schedule=dataclasses.replace(proxy.schedule, warmup=50))
    assert "64" in said(model=small)
    assert "xx" in said(data=dataclasses.replace(proxy.data, mixture=Mixture.shares({"xx": 1.0})))
    other = at_work / "other"
    shutil.copytree(proxy.heldout, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "99" in said(heldout=str(other))


@pytest.fixture
def trunk(study):  # noqa: F811
    """The checkpoint of step 6 of a run that differs from `study.proxy` by its name alone; its weights are none."""
    trunk = dataclasses.replace(study.proxy, name="trunk")
    inputs = open_inputs(trunk)
    stores = {"store": inputs.data.fingerprint, "heldout": inputs.heldout.store.fingerprint}
    claim_run(trunk, "", {"tokenizer": inputs.tokenizer.sha256, **stores}, {})
    write_checkpoint(trunk.run / "checkpoints", 6, {"weights": (2,)}, [("weights", (), np.ones(2, np.float32))], {})
    return trunk.run / "checkpoints/6"


def test_what_a_run_begins_with_is_looked_at_before_it_waits(at_work, study, trunk):  # noqa: F811
    proxy = study.proxy
    run = trunk.parent.parent

    def written(**changed):
        return "launch", write_experiment(dataclasses.replace(proxy, **changed), at_work), "--site", "test", "--dry-run"

    for sound in ({"start_from": str(run)}, {"branch_from": str(trunk)}):
        said = run_command(*written(**sound))
        assert (said.status, said.err) == (0, ""), said
    shorter = written(branch_from=str(trunk), steps=6)
    assert "has 6 behind it: set steps to 7 or more" in refuse(at_work, *shorter)
    other_rate = written(branch_from=str(trunk), schedule=dataclasses.replace(proxy.schedule, peak=1.0))
    assert "its schedule has a rate of" in refuse(at_work, *other_rate)
    wider = written(start_from=str(run), model=dataclasses.replace(proxy.model, width=32))
    assert "has other weights than the model" in refuse(at_work, *wider)
    for nowhere in ({"start_from": "nowhere"}, {"branch_from": "nowhere/checkpoints/6"}):
        assert "nowhere is not a run directory" in refuse(at_work, *written(**nowhere))
    assert "holds no sound checkpoint of step 7" in refuse(at_work, *written(branch_from=str(trunk.with_name("7"))))
    (trunk / "progress/metadata").write_text("{ }")
    for damaged in ({"start_from": str(run)}, {"branch_from": str(trunk)}):
        said = run_command(*written(**damaged))
        assert said.status == 1
        assert f"eurollm: {trunk.parent} holds no sound checkpoint" in said.err
    assert trunk.is_dir()  # it is not the launch that sets it aside


def test_what_an_image_must_see_is_mounted(at_work, file, study):  # noqa: F811
    (at_work / "x.sif").touch()
    elsewhere = at_work.parent / f"{at_work.name} elsewhere"
    command = ("launch", file, "--site", "test", "--dry-run", "--container", "x.sif")
    first = run_command(*command)
    (binds,) = [line for line in first.out.splitlines() if line.startswith("binds=")]
    proxy = study.proxy
    inputs = [Path(path) for path in (proxy.tokenizer, proxy.heldout, *proxy.data.stores)]
    folders = {str(path if path.is_dir() else path.parent) for path in inputs}
    outside = {folder for folder in folders if not Path(folder).is_relative_to(at_work)}
    assert outside
    assert set(binds.removeprefix("binds=").replace('"', "").split(",")) == {"$PWD"} | outside
    elsewhere.symlink_to(proxy.heldout)
    assert "has a ' ' in its name, at which containers divide" in refuse(at_work, *command, "--heldout", elsewhere)
    link = at_work.parent / f"{at_work.name}-link"
    link.symlink_to(proxy.heldout)
    assert f",{link}" in run_command(*command, "--heldout", link).out


def test_a_run_that_is_complete_is_not_launched(file, study):  # noqa: F811
    (study.proxy.run / "checkpoints" / "12").mkdir(parents=True)
    said = run_command("launch", file, "--site", "test", "--dry-run")
    assert "from step 12 of 12" in said.out
    (study.proxy.run / "evaluation.json").write_text("{}")
    said = run_command("launch", file, "--site", "test")
    assert said.status == 0
    assert "is complete: all 12 steps" in said.out


def test_a_study_is_an_array_of_its_ensembles_and_what_follows(at_work, study_file):
    said = run_command("launch", "study", "--site", "test", study_file, "--dry-run")
    assert (said.status, said.err) == (0, "")
    array, last = said.out.split("#!/bin/bash\n")[1:]
    words, options = steps_of(array)
    assert words == ["ablate", "--ensembles", "$SLURM_ARRAY_TASK_ID/1", "--time-limit", "$time_limit", str(study_file)]
    assert (options["array"], options["nodes"], options["ntasks-per-node"]) == ("0-0", "1", "1")
    assert steps_of(last)[0] == ["ablate", "--time-limit", "$time_limit", str(study_file)]
    on_gpus = run_command("launch", "study", "--site", "gpu", study_file, "--dry-run")
    array, last = on_gpus.out.split("#!/bin/bash\n")[1:]
    assert "export JAX_PLATFORMS=cuda\n" in array
    assert "export JAX_PLATFORMS=cuda,cpu\n" in last
    assert "has 1 ensembles on a node: take 1 to 1" in refuse(
        at_work, "launch", "study", "--site", "test", study_file, "--tasks", 2
    )


def test_a_corpus_is_an_array_of_tasks_and_the_one_that_seals_it(at_work, tokenizer, corpus_dir):
    prepare = (f"{corpus_dir}/*.jsonl", "--tokenizer", tokenizer.model_path.parent, "--out", "it's a store")
    options = ("--site", "test", "--tasks", 4, "--partition", "cpus", "--cores", 3, "--time", "12:00:00")
    said = run_command("launch", "corpus", *options, "--dry-run", "--", *prepare)
    assert (said.status, said.err) == (0, "")
    array, last = said.out.split("#!/bin/bash\n")[1:]
    words, directives = steps_of(array)
    assert words == ["corpus", "prepare", "--task", "$SLURM_ARRAY_TASK_ID", "--of", "4", *map(str, prepare)]
    assert (directives["array"], directives["partition"], directives["cpus-per-task"]) == ("0-3", "cpus", "3")
    assert "XLA_FLAGS" not in array
    assert steps_of(last)[0] == ["corpus", "finalize", "it's a store"]
    assert "--task and --of are given to each job" in refuse(
        at_work, "launch", "corpus", *options, "--", *prepare, "--task", 0, "--of", 4
    )
    assert run_command("launch", "corpus", "--site", "test", "--tasks", 4).status == 2
    assert "--nodes 4 is of a training run" in refuse(
        at_work, "launch", "corpus", *options, "--nodes", 4, "--", *prepare
    )
    assert "name --time: test's limit of 24:00:00 is that of partition (default)." in refuse(
        at_work, "launch", "corpus", *options[:-2], "--", *prepare
    )
    assert "\n  75|138)" in array
    assert "\n  75)" in last


def test_help_comes_at_once_and_says_what_there_is():
    code = "import sys; from eurollm_jax.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += f"print([name for name in {SLOW_IMPORTS} if name in sys.modules])"
    for words in (["launch", "--help"], ["launch", "corpus", "--help"], ["launch", "study", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
        assert "--dry-run" in done.stdout


def test_a_corpus_is_prepared_by_its_jobs(at_work, tokenizer, corpus_dir, store, monkeypatch):
    with Cluster(at_work / "slurm", monkeypatch) as cluster:
        prepare = (corpus_dir, "--tokenizer", tokenizer.model_path.parent, "--out", at_work / "out")
        said = run_command("launch", "corpus", "--site", "test", "--tasks", 3, "--cores", 1, "--", *prepare)
        assert said.status == 0, said.err
        logs = "".join(path.read_text() for path in (at_work / "out.launch/logs").glob("*.out"))
        assert [job["state"] for job in cluster.ended()] == ["COMPLETED"] * 4, logs
    assert (at_work / "out/manifest.json").read_bytes() == (store.path / "manifest.json").read_bytes()


@pytest.mark.slow
def test_a_study_is_trained_by_its_jobs(at_work, study, study_file, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XLA_FLAGS", flags(2))
    with Cluster(at_work / "slurm", monkeypatch) as cluster:
        quick = "analysis=Analysis(bootstraps=20, folds=3, starts=2)"
        study_file.write_text(f"{study_file.read_text()}STUDY = dataclasses.replace(STUDY, at_once=3, {quick})\n")
        said = run_command("launch", "study", study_file, "--site", "test", "--follow")
        assert said.status == 0, said.err + said.out
        assert [job["state"] for job in cluster.ended()] == ["COMPLETED"] * 5
    assert (study.folder / "report.html").is_file()
    assert len(list((study.folder / "proxies").glob("*/ensemble.json"))) == 4
