"""The doctor as a command, alone and as several processes, each with a fault that was planted for it."""

import os
import signal
import time

import pytest

from tests.cluster.doctors import QUICK, Doctors, distribution
from tests.processes import free_port

SOUND = {"import of jax", "connection", "backend", "products", "attention", "scratch writable", "dependencies"}


@pytest.fixture
def doctors(tmp_path):
    with Doctors(tmp_path) as started:
        yield started


def test_a_sound_environment_passes(doctors):
    said = doctors.alone()
    assert said.status == 0, said
    assert said.found["status"] == "pass"
    assert {said.row(check)["status"] for check in SOUND} == {"pass"}
    assert "blockwise: the default on cpu; within" in said.row("attention")["seen"]
    assert said.row("all-reduce in a node")["status"] == "not checked"
    assert "doctor: ready to train" in said.out
    assert [path.name for path in doctors.folder.iterdir()] == ["found-0.json"]


def plugin(folder, does):
    """A plug-in of JAX's that does this when it is asked for devices; for PYTHONPATH."""
    module = folder / "jax_plugins/planted/__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"import os, time\ndef initialize():\n    {does}\n")
    return {"PYTHONPATH": str(folder), "JAX_PLATFORMS": ""}


def test_a_site_with_gpus_where_none_are_and_a_plug_in_that_does_not_start(doctors):
    """JAX itself goes on with the CPU."""
    broken = plugin(doctors.folder / "planted", "raise RuntimeError('no driver for this')")
    said = doctors.alone("--site", "generic-nvidia", environment=broken)
    assert said.status == 1
    assert {"plug-in", "driver", "backend", "devices"} <= said.failing()
    assert said.row("plug-in")["remedy"] == 'pip install "eurollm_jax[cuda]"'
    assert said.row("backend")["seen"].startswith("cpu, and cuda is wanted")
    assert "no driver for this" in said.row("backend")["seen"]
    assert "names 8 a node, and" in said.row("devices")["seen"]
    assert "doctor: failed: " in said.out


def test_a_jaxlib_that_jax_refuses_is_told_without_a_traceback(doctors):
    planted = distribution(doctors.folder / "planted", "jaxlib", "0.99.0")
    (planted / "jaxlib").mkdir()
    (planted / "jaxlib/__init__.py").touch()
    (planted / "jaxlib/version.py").write_text("__version__ = '0.99.0'\n")
    said = doctors.alone(environment={"PYTHONPATH": str(planted)})
    assert said.status == 1
    assert {"jax and jaxlib", "import of jax"} <= said.failing()
    assert "jaxlib version 0.99.0 is newer than and incompatible with" in said.row("import of jax")["seen"]
    assert said.row("attention")["status"] == "not checked"
    assert "Traceback" not in said.out + said.err


def test_a_rank_with_another_dependency_and_one_that_differs_in_a_flag(doctors):
    planted = distribution(doctors.folder / "planted", "numpy", "2.3.99")
    of_process = {1: {"PYTHONPATH": str(planted)}, 2: {"XLA_FLAGS": f"{QUICK} --xla_cpu_enable_fast_math=false"}}
    first, *others = doctors.all_ended(doctors.together(3, "--seconds", "60", of_process=of_process))
    assert first.status == 1
    assert first.failing() == {"processes alike"}
    seen = [row["seen"] for row in first.rows("processes alike")]
    assert any(": numpy 2.3.99; all others 2." in text and "process 1 on " in text for text in seen), seen
    assert any(
        "process 2 on " in text and "--xla_cpu_enable_fast_math=false; all others --xla" in text for text in seen
    )
    assert "exact over 3 devices" in first.row("all-reduce in a node")["seen"]
    assert first.row("clocks")["status"] == "pass"
    assert first.row("scratch shared")["status"] == "pass"
    assert [(other.status, other.out) for other in others] == [(0, ""), (0, "")]
    assert {path.name for path in doctors.folder.iterdir()} == {"planted", "found.json"}


def test_a_process_that_never_comes_is_named(doctors):
    began = time.monotonic()
    first, other = doctors.all_ended(doctors.together(3, "--seconds", "5", absent=[2]))
    assert time.monotonic() - began < 100
    assert (first.status, other.status) == (1, 1)
    assert first.failing() == {"processes there"}
    assert "process 2 said nothing of itself within 5 s" in first.row("processes there")["seen"]
    assert first.row("dependencies")["status"] == "pass"
    assert first.row("all-reduce of all")["seen"] == "not all processes are there"
    assert other.out == ""  # process 0 has told it


@pytest.mark.slow
def test_a_plug_in_that_does_not_start_is_told_where_jax_goes_on_with_the_cpu(doctors):
    said = doctors.alone(environment=plugin(doctors.folder / "planted", "raise RuntimeError('no driver for this')"))
    assert said.row("backend")["status"] == "warn"
    assert "no driver for this" in said.row("backend")["seen"]


@pytest.mark.slow
def test_a_plug_in_whose_library_cannot_be_loaded_is_told_where_jax_says_nothing(doctors):
    variables = plugin(doctors.folder / "planted", "pass")
    library = doctors.folder / "planted/lib.so"
    library.write_text("no library")
    with (doctors.folder / "planted/jax_plugins/planted/__init__.py").open("a") as module:
        module.write(f"def _get_library_path():\n    return {str(library)!r}\n")
    said = doctors.alone(environment=variables)
    assert said.row("backend")["status"] == "warn"
    assert "jax_plugins.planted: OSError: " in said.row("backend")["seen"]


@pytest.mark.slow
def test_a_rank_whose_plug_in_ends_it_is_named_and_its_findings_are_not_lost(doctors):
    """It is gone without a word, while the others wait for its devices."""
    crash = plugin(doctors.folder / "planted", "os.abort()")
    first, other = doctors.all_ended(doctors.together(2, "--seconds", "8", of_process={1: crash}))
    assert (first.status, other.status) == (1, 1)
    assert "process 1 said nothing of its devices" in first.row("processes there")["seen"]
    assert first.row("dependencies")["processes"] == []  # of both
    assert "ended by SIGABRT at devices" in other.out
    assert "process 1 on " in other.out


@pytest.mark.slow
def test_a_driver_that_never_answers(doctors):
    said = doctors.alone("--seconds", "4", environment=plugin(doctors.folder / "planted", "time.sleep(1000)"))
    assert said.status == 1
    assert "no device comes up: no answer within 4 s" in said.row("backend")["seen"]
    assert said.row("products")["status"] == "not checked"


@pytest.mark.slow
def test_two_names_of_the_share_of_memory_where_only_gpus_are_asked_for(doctors):
    """JAX then says no more than that there are none."""
    both = dict.fromkeys(("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"), "0.9")
    said = doctors.alone(environment={"JAX_PLATFORMS": "cuda", **both})
    assert said.row("backend")["status"] == "fail"
    assert said.row("backend")["remedy"].startswith("unset XLA_CLIENT_MEM_FRACTION or XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_a_flag_that_the_compiler_does_not_know(doctors):
    """It ends the process that asks for devices."""
    said = doctors.alone(environment={"XLA_FLAGS": "--xla_no_such_flag=1"})
    assert said.status == 1
    assert "xla_no_such_flag" in said.row("XLA_FLAGS")["seen"]
    assert said.row("backend")["status"] == "not checked"


@pytest.mark.slow
def test_without_process_0_each_tells_what_it_has_found(doctors):
    found = doctors.all_ended(doctors.together(3, "--seconds", "4", absent=[0]))
    for said in found:
        assert said.status == 1
        assert "process 0 cannot be reached at localhost:" in " ".join(said.out.split())


@pytest.mark.slow
def test_two_ranks_that_claim_one_number(doctors):
    joining = f"--coordinator localhost:{free_port()} --processes 3 --seconds 60 --process".split()
    started = [doctors.start(*joining, "0", "--json", doctors.folder / "found.json")]
    first, *others = doctors.all_ended([*started, *(doctors.start(*joining, "1") for _ in range(2))])
    assert [said.status for said in (first, *others)] == [1, 1, 1]
    assert any("process 1 of 3 is there twice, both on " in row["seen"] for row in first.rows("processes there"))
    assert "is there twice" in first.row("backend")["seen"]


@pytest.mark.slow
def test_a_rank_whose_jax_cannot_be_imported_tells_process_0(doctors):
    planted = doctors.folder / "planted/jaxlib"
    planted.mkdir(parents=True)
    (planted / "__init__.py").touch()
    broken = {"PYTHONPATH": str(planted.parent)}
    first, other = doctors.all_ended(doctors.together(2, "--seconds", "60", of_process={1: broken}))
    assert (first.status, other.status, other.out) == (1, 1, "")
    (row,) = [row for row in first.rows("import of jax") if row["status"] == "fail"]
    assert row["processes"] == [1]
    assert first.row("backend")["seen"].startswith("jax cannot be imported by process 1 on ")


@pytest.mark.slow
def test_a_rank_without_the_devices_plug_in_keeps_nobody_waiting(doctors):
    """Devices of different versions of jax would wait for each other: they are not asked for."""
    planted = distribution(doctors.folder / "planted", "jax-cuda13-plugin", "0.12.0.1")
    first, *_ = doctors.all_ended(doctors.together(2, "--seconds", "60", of_process={1: {"PYTHONPATH": str(planted)}}))
    assert first.status == 1
    assert any("jax-cuda13-plugin" in row["seen"] for row in first.rows("processes alike"))
    assert "different versions of jax-cuda13-plugin" in first.row("backend")["seen"]


@pytest.mark.slow
def test_a_slow_rank_is_named(doctors):
    """One of three is stopped for most of the time, from when its devices come up, as if its clock were slow."""
    seen = doctors.folder / "devices"
    environment = plugin(doctors.folder / "planted", "os.environ.get('MARK') and open(os.environ['MARK'], 'w').close()")
    of_process = {0: environment, 1: environment, 2: {**environment, "MARK": str(seen)}}
    started = doctors.together(3, "--seconds", "90", of_process=of_process)
    while not seen.exists():
        assert started[2].poll() is None
        time.sleep(0.05)
    end = time.monotonic() + 45  # a sixteenth of it suffices for its products
    while time.monotonic() < end and started[2].poll() is None:
        for number, seconds in ((signal.SIGSTOP, 0.75), (signal.SIGCONT, 0.05)):
            os.killpg(started[2].pid, number)
            time.sleep(seconds)
    first = doctors.all_ended(started)[0]
    assert first.status == 1
    assert "products" in first.failing()
    assert first.row("products")["seen"].startswith("process 2 on ")


@pytest.mark.slow
def test_a_rank_that_is_killed_while_others_wait_for_it(doctors):
    began = time.monotonic()
    started = doctors.together(3, "--seconds", "15")
    os.killpg(started[1].pid, signal.SIGSTOP)  # before it has come: its start takes seconds
    time.sleep(3)
    os.killpg(started[1].pid, signal.SIGKILL)
    first, _, other = doctors.all_ended(started)
    assert time.monotonic() - began < 100
    assert (first.status, other.status) == (1, 1)
    assert "process 1 said nothing of itself" in first.row("processes there")["seen"]


@pytest.mark.slow
def test_in_a_slurm_step_the_processes_find_each_other(doctors):
    """As srun sets its variables."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    found = doctors.folder / "found.json"
    started = [
        doctors.start(
            "--json",
            found,
            environment={**step, "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)},
        )
        for process in range(2)
    ]
    first, other = doctors.all_ended(started)
    assert (first.status, other.status) == (0, 0), first
    assert first.found["processes"] == 2
    assert "exact over 2 devices" in first.row("all-reduce in a node")["seen"]
