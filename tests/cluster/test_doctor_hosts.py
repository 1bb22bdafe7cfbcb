"""The doctor's judgements on one host, each on what was planted for it: drivers, variables, limits, folders."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from eurollm_jax.cluster.doctor import devices, host, scratch, shared
from eurollm_jax.cluster.sites import SITES

SITE = {site.name: site for site in SITES}


# --------------------------------------------------------------------------------------------------------------- hosts

NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@b)  Thu\nGCC version: 13\n"


def a_host(folder, nvidia=None, amd=None):
    if nvidia:
        (folder / "proc/driver/nvidia").mkdir(parents=True)
        (folder / "proc/driver/nvidia/version").write_text(NVRM.format(nvidia))
    if amd is not None:
        (folder / "dev").mkdir()
        (folder / "dev/kfd").touch()
        (folder / "sys/module/amdgpu").mkdir(parents=True)
        (folder / "sys/module/amdgpu/version").write_text(f"{amd}\n")
    return folder


DRIVERS = [
    ({"nvidia": "580.65.06"}, "cuda", 13, "pass", "580.65.06"),
    ({"nvidia": "550.54.15"}, "cuda", 13, "fail", "needs 580"),
    ({"nvidia": "550.54.15"}, "cuda", 12, "pass", "550.54.15"),
    ({}, "cuda", 13, "fail", "--nv"),
    ({"amd": "6.12.12"}, "rocm", None, "pass", "amdgpu 6.12.12"),
    ({"amd": ""}, "rocm", None, "pass", "of the kernel"),
    ({"nvidia": "580.65.06"}, "rocm", None, "fail", "/dev/kfd"),
    ({}, None, None, "pass", "no accelerator"),
]


@pytest.mark.parametrize(("there", "expected", "cuda", "status", "said"), DRIVERS)
def test_drivers(tmp_path, there, expected, cuda, status, said):
    (found,) = host.driver(expected, cuda, a_host(tmp_path, **there), "none.so")
    assert (found.status, said in f"{found.seen} {found.remedy}") == (status, True), found


def test_an_older_driver_is_mended_by_what_there_is(tmp_path):
    """Which is no plug-in for an older CUDA: the project has none."""
    (found,) = host.driver("cuda", 13, a_host(tmp_path, nvidia="570.86.15"), "none.so")
    assert "series 580 or newer" in found.remedy
    assert "cuda-compat-13-*" in found.remedy
    assert "CUDA 12" not in found.remedy


def test_the_document_names_the_driver_that_the_extra_needs():
    """Of the release of CUDA that pyproject.toml asks for."""
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (release,) = re.findall(r"cuda(\d+)", " ".join(extras["cuda"]))
    text = " ".join((root / "docs/sites.md").read_text().split())
    assert f"NVIDIA driver must be of series {host.OLDEST_DRIVER[int(release)]} or newer" in text
    assert "holds for the extra `cuda` without a container, too" in text


@pytest.mark.parametrize(("release", "status"), [(13000, "pass"), (12080, "fail")])
def test_libraries_that_make_an_older_driver_do(tmp_path, release, status):
    if shutil.which("cc") is None:
        pytest.skip("there is no compiler of C for a library of a driver's")
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(f"int cuDriverGetVersion(int *release) {{ *release = {release}; return 0; }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    (found,) = host.driver("cuda", 13, a_host(tmp_path / "root", nvidia="570.86.15"), str(library))
    assert (found.status, host.library_release(str(library))) == (status, release // 1000)


SOCKETS = [
    ("hsn", "pass"),
    ("hsn0,hsn1", "pass"),
    ("=hsn0", "pass"),
    ("=hsn", "fail"),
    ("ib0", "fail"),
    ("hsn0,ib0", "warn"),
    ("^lo,docker", "pass"),
    ("^hsn,eth,lo", "fail"),
]


@pytest.mark.parametrize(("chosen", "status"), SOCKETS)
def test_network_interfaces_are_those_of_the_host(chosen, status):
    (found,) = host.interfaces({"NCCL_SOCKET_IFNAME": chosen}, ["lo", "hsn0", "hsn1", "eth0"])
    assert found.status == status, found


def test_the_sites_variables():
    site = replace(SITE["lumi"], environment={"A": "1", "B": "$HOME/x", "XLA_FLAGS": "--xla_y"})
    assert host.site_variables(site, {"A": "1", "B": "/x"}).status == "pass"
    found = host.site_variables(site, {"A": "2"})
    assert found.status == "warn"
    assert "B is not set" in found.seen
    assert "A=2, the site has 1" in found.seen
    assert found.remedy == "export A=1 B=$HOME/x"


def test_flags_of_the_compiler_that_are_not_set():
    assert devices.flags_finding("cpu", {}).status == "pass"
    found = devices.flags_finding("cuda", {"XLA_FLAGS": "--xla_some_flag=1"})
    assert found.status == "warn"
    given = " ".join(str(flag) for flag in devices.FLAGS["rocm"])
    assert devices.flags_finding("rocm", {"XLA_FLAGS": f"--xla_some_flag=1 {given}"}).status == "pass"


def test_two_names_of_the_share_of_memory_are_told_apart(monkeypatch):
    """jaxlib has no GPU then; the doctor must not send for a plug-in that is there."""
    from jaxlib import xla_client

    both = {devices.FRACTION_VARIABLE: "0.9", devices.NEWER_VARIABLE: "0.9"}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in both:
        monkeypatch.delenv(name, raising=False)
    assert devices.backend_finding(SITE["generic-nvidia"], [], []).remedy.startswith("pip install")
    for name, value in both.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{devices.NEWER_VARIABLE} is specified together"):
        xla_client.generate_pjrt_gpu_plugin_options()
    assert devices.backend_finding(SITE["generic-nvidia"], [], []).remedy == devices.fractions_clash(both)
    assert all(name in devices.fractions_clash(both) for name in both)
    assert {devices.fractions_clash({name: "0.9"}) for name in both} == {""}


# ------------------------------------------------------------------------------------------------------------- folders

SCRIPT = """
import json, sys
from pathlib import Path
from eurollm_jax.cluster.doctor.scratch import scratch_findings
print(json.dumps([vars(finding) for finding in scratch_findings(Path(sys.argv[1]), 8 << 20)]))
"""


def findings_of(folder, before=""):
    """Of a folder, in a process that has done something `before`, such as mounting a file system there."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    if before:
        command = ["unshare", "-Urm", "sh", "-c", f'{before} "$1" && exec "$0" -c "$2" "$1"', sys.executable]
        command += [str(folder), SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture
def mounts(tmp_path):
    tried = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True)
    if tried.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    return tmp_path


def test_a_sound_folder_passes_and_keeps_nothing(tmp_path):
    found = {finding.check: finding for finding in scratch.scratch_findings(tmp_path, 1 << 20)}
    assert tuple(found) == scratch.CHECKS
    assert {found[check].status for check in scratch.CHECKS if check != "scratch room"} == {"pass"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only(mounts):
    found = findings_of(mounts, "mount -t tmpfs -o ro tmpfs")
    assert found["scratch writable"]["status"] == "fail"
    assert "read-only file system" in found["scratch writable"]["seen"]
    assert found["scratch locks"]["status"] == "not checked"


def test_a_disk_without_room(mounts):
    found = findings_of(mounts, "mount -t tmpfs -o size=2m tmpfs")
    assert found["scratch writable"]["status"] == "fail"
    assert "no space left on device" in found["scratch writable"]["seen"]
    assert "quota" in found["scratch writable"]["remedy"]
    assert found["scratch room"]["status"] == "warn"
    assert found["scratch renames"]["status"] == "pass"


def test_room_for_few_files_only(mounts):
    found = findings_of(mounts, "mount -t tmpfs -o size=50m,nr_inodes=50 tmpfs")
    assert found["scratch writable"]["status"] == "pass"
    assert "more files only" in found["scratch room"]["seen"]


def test_a_folder_that_is_not_there_or_not_known(tmp_path):
    (found, *others) = scratch.scratch_findings(tmp_path / "none", 1)
    assert found.status == "fail"
    assert found.remedy.startswith("mkdir -p")
    assert {other.status for other in others} == {"not checked"}
    site = replace(SITE["lumi"], scratch="/scratch/$SLURM_JOB_ACCOUNT/${USER}")
    assert scratch.scratch_folder(tmp_path, site, {}) == tmp_path
    assert str(scratch.scratch_folder(None, site, {"SLURM_JOB_ACCOUNT": "p1", "USER": "me"})) == "/scratch/p1/me"
    unset = scratch.scratch_folder(None, site, {"USER": "me"})
    assert (unset.status, unset.seen.endswith(": SLURM_JOB_ACCOUNT: unbound variable")) == ("not checked", True)
    assert "--scratch" in unset.remedy


JOB = {"PATH": os.environ["PATH"], "USER": "me", "SLURM_JOB_ACCOUNT": "p1", "SCRATCH": "/disk/my runs"}
GOLDEN = Path(__file__).parents[1] / "golden/launch"


@pytest.mark.parametrize("site", [site for site in SITES if site.scratch], ids=lambda site: site.name)
def test_each_sites_folder_is_that_of_its_job_script(site):
    folder = scratch.scratch_folder(None, site, JOB)
    assert isinstance(folder, Path), folder
    assert "$" not in str(folder)
    (line,) = re.findall(r"^scratch_folder=.*$", (GOLDEN / f"{site.name}.sbatch").read_text(), re.MULTILINE)
    script = f'{line}; printf %s "$scratch_folder"'
    done = subprocess.run(["bash", "-c", script], env=JOB, capture_output=True, text=True, check=True)
    assert str(folder) == done.stdout


def test_a_folder_that_the_shell_does_not_tell(monkeypatch, tmp_path):
    def why(text, environment=JOB):
        found = scratch.scratch_folder(None, replace(SITE["lumi"], scratch=text), environment)
        assert (found.status, "--scratch" in found.remedy) == ("not checked", True)
        return found.seen

    assert "no_such_command" in why("/scratch/$(no_such_command)/x")
    assert "no folder" in why("$SCRATCH", {**JOB, "SCRATCH": ""})
    assert "cannot be started" in why("/x", {"PATH": str(tmp_path)})
    monkeypatch.setattr(scratch, "SHELL_SECONDS", 0.2)
    assert "within 0.2 s" in why("/scratch/$(exec sleep 5)")


def test_renames_that_are_not_whole_are_seen(tmp_path, monkeypatch):
    def copied(partial, path):
        path.write_bytes(b"")
        time.sleep(0.002)
        path.write_bytes(partial.read_bytes())

    monkeypatch.setattr(scratch.Path, "replace", copied)
    assert "seen as it should never be" in scratch.renames(tmp_path).seen


def test_locks_that_keep_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.fcntl, "flock", lambda file, how: None)
    assert scratch.locks(tmp_path).status == "warn"

    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    assert "function not implemented" in scratch.locks(tmp_path).seen


def test_a_file_server_with_another_clock():
    assert scratch.dated_finding(0.2).status == "pass"
    found = scratch.dated_finding(75.0)
    assert (found.status, "75.0 s off" in found.seen) == ("warn", True)


def test_whether_processes_share_their_folder(tmp_path):
    with shared.hold(tmp_path) as held:
        see = f"from eurollm_jax.cluster.doctor.shared import *; print(seen_by_another(Path({str(held)!r})).status)"
        done = subprocess.run([sys.executable, "-c", see], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "pass"
    found = shared.seen_by_another(held)
    assert (found.status, "does not hold" in found.seen) == ("fail", True)
    held.touch()  # there, and its lock does not reach
    assert shared.seen_by_another(held).status == "warn"
