"""The doctor's judgements, each on what was planted for it: installations, and figures of processes."""

import importlib
import importlib.metadata
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from eurollm_jax.cli import main
from eurollm_jax.cluster.doctor import checks, compare, examine, versions
from eurollm_jax.cluster.doctor.finding import Finding, Report, failed, passed
from eurollm_jax.cluster.doctor.meeting import Meeting
from eurollm_jax.cluster.doctor.table import LINES, rows, status_of, summary
from eurollm_jax.cluster.sites import SITES
from tests.cluster.doctors import distribution

SITE = {site.name: site for site in SITES}
JAX, JAXLIB = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder whose distributions stand before those that are installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path


# ----------------------------------------------------------------------------------------------------- installations


def test_this_installation_is_sound():
    found = {finding.check: finding for finding in versions.version_findings(None)}
    assert {check: finding.status for check, finding in found.items()} == dict.fromkeys(
        ("python", "dependencies", "jax and jaxlib", "plug-in"), "pass"
    )
    assert JAX in found["jax and jaxlib"].seen
    assert versions.version_facts()["jaxlib"] == JAXLIB


def test_a_dependency_that_is_too_old_is_named_with_what_is_needed(planted):
    distribution(planted, "optax", "0.1.2")
    found = versions.dependencies()
    assert found.status == "fail"
    assert "optax 0.1.2, needed is >=" in found.seen
    assert found.remedy.startswith('pip install "optax>=')
    assert versions.version_facts()["optax"] == "0.1.2"


@pytest.mark.parametrize("version", ["0.99.0", "0.4.30"])
def test_a_jaxlib_that_jax_refuses(planted, version):
    distribution(planted, "jaxlib", version)
    found = versions.jax_and_jaxlib()
    assert found.status == "fail"
    assert f"jaxlib {version}, needed is" in found.seen


CUDA = {"jax-cuda13-plugin": [f"jax-cuda13-pjrt=={JAXLIB}"], "jax-cuda13-pjrt": []}
ROCM = {"jax-rocm7-plugin": [f"jax-rocm7-pjrt=={JAXLIB}"], "jax-rocm7-pjrt": []}
PLUGINS = [
    ({}, "cpu", "pass", "none"),
    ({}, "cuda", "fail", 'pip install "eurollm_jax[cuda]"'),
    (ROCM, "cuda", "fail", 'pip install "eurollm_jax[cuda]"'),
    ({}, "rocm", "fail", 'pip install "eurollm_jax[rocm]"'),
    (CUDA, "cuda", "pass", f"jax-cuda13-plugin {JAXLIB}"),
    (ROCM, "rocm", "pass", f"jax-rocm7-plugin {JAXLIB}"),
    (CUDA | ROCM, "cuda", "fail", "more than one"),
    ({"jax-cuda13-plugin": CUDA["jax-cuda13-plugin"]}, "cuda", "fail", "jax-cuda13-pjrt is missing"),
    (CUDA | {"jax-cuda13-plugin": ["jax-cuda13-pjrt==0.1.0"]}, "cuda", "fail", f"jax-cuda13-pjrt {JAXLIB}, needed is"),
]


@pytest.mark.parametrize(("there", "expected", "status", "said"), PLUGINS)
def test_plug_ins(planted, there, expected, status, said):
    for name, requires in there.items():
        distribution(planted, name, JAXLIB, requires)
    found = versions.plugins(expected)
    assert (found.status, said in f"{found.seen} {found.remedy}") == (status, True), found


def test_a_cuda_plug_in_of_another_version_than_jaxlib_is_told(planted):
    distribution(planted, "jax-cuda13-plugin", "0.5.0")
    distribution(planted, "jax-cuda13-pjrt", "0.5.0")
    found = versions.plugins("cuda")
    assert found.status == "fail"
    assert f"jax-cuda13-plugin 0.5.0 beside jaxlib {JAXLIB}" in found.seen
    assert versions.cuda_release() == 13


def test_a_wrong_cudnn_is_told_and_a_machines_own_is_not_missed(planted):
    needs = ['nvidia-cudnn-of-a-test<10.0,>=9.8; extra == "with-cuda"']
    distribution(planted, "jax-cuda13-plugin", JAXLIB, [*CUDA["jax-cuda13-plugin"], *needs])
    distribution(planted, "jax-cuda13-pjrt", JAXLIB)
    assert versions.plugins("cuda").status == "pass"
    distribution(planted, "nvidia-cudnn-of-a-test", "9.1.0")
    importlib.invalidate_caches()
    assert "nvidia-cudnn-of-a-test 9.1.0, needed is" in versions.plugins("cuda").seen


# ----------------------------------------------------------------------------------------------------- many processes


def reports(count, per_host=4, **measured):
    """Of so many processes with two devices each, four processes a node."""
    facts = {"jax": "0.12.0", "numpy": "2.4.0", "driver": "580.65.06", "backend": "cuda", "device kind": "NVIDIA H100"}
    figures = {"devices": [2], "products": [600e12, 610e12], "clock": [0.001, 0.0005], **measured}
    return [Report(i, f"nid{1 + i // per_host:04d}", (), facts, figures) for i in range(count)]


def changed(report, **facts):
    return replace(report, facts={**report.facts, **facts})


def test_the_odd_one_out_is_named_with_what_all_others_have():
    found = reports(8)
    assert [finding.status for finding in compare.alike(found)] == ["pass"]
    found[5] = changed(found[5], numpy="2.3.1")
    (finding,) = compare.alike(found)
    assert finding.status == "fail"
    assert finding.seen == "process 5 on nid0002: numpy 2.3.1; all others 2.4.0"
    found[5] = changed(reports(8)[5], driver="550.1")
    assert [finding.status for finding in compare.alike(found)] == ["warn"]


def test_several_odd_ones_are_named_by_value():
    found = reports(12)
    for process, version in ((1, "0.11"), (9, "0.11"), (10, "0.13")):
        found[process] = changed(found[process], jax=version)
    (finding,) = compare.alike(found)
    assert finding.seen == "processes 1, 9 on 2 hosts: jax 0.11; process 10 on nid0003: jax 0.13; all others 0.12.0"


def test_processes_that_say_nothing_are_named():
    found = reports(4)
    assert compare.all_there(found, "itself", 5) == []
    (finding,) = compare.all_there([found[0], None, found[2], None], "itself", 5)
    assert finding.status == "fail"
    assert finding.seen.startswith("processes 1, 3 said nothing of itself within 5 s")


def test_a_site_that_names_more_devices_than_are_there():
    site = SITE["generic-nvidia"]  # 8 on a node
    assert compare.device_counts(reports(8), site).status == "pass"
    fewer = compare.device_counts(reports(8, devices=[1]), site)
    assert fewer.status == "fail"
    assert "names 8 a node, and nid0001 has 4, nid0002 has 4" in fewer.seen
    assert "write a site file" in fewer.remedy
    assert compare.device_counts(reports(8, devices=[4]), site).status == "warn"
    assert compare.device_counts(reports(8), None).status == "pass"
    uneven = [*reports(8)[:7], replace(reports(8)[7], measured={"devices": [1]})]
    assert "not the same on each node" in compare.device_counts(uneven, None).seen
    assert compare.device_counts(reports(1, devices=[3]), SITE["local"]).status == "pass"


def test_clocks_that_differ():
    assert compare.clocks(reports(1)).status == "not checked"
    assert "within 1.5 ms" in compare.clocks(reports(8)).seen
    found = reports(8)
    found[6] = replace(found[6], measured={"clock": [-4.0, 0.5]})
    off = compare.clocks(found)
    assert (off.status, "process 6 on nid0002 by 3.5 s at least" in off.seen) == ("fail", True)
    found[6] = replace(found[6], measured={"clock": [4.0, 3.5]})  # it may be half a second
    assert compare.clocks(found).status == "pass"


def test_a_slow_device_is_named_with_its_process_and_host():
    assert compare.products(reports(8)).status == "pass"
    assert "62%" in compare.products(reports(8)).seen  # of 989 TFLOP/s
    found = reports(8)
    found[3] = replace(found[3], measured={"products": [600e12, 300e12]})
    slow = compare.products(found)
    assert slow.status == "fail"
    assert slow.seen.startswith("process 3 on nid0001, device 1 is at 50% of 600 TFLOP/s as a rule over 16 device(s)")
    found[3] = replace(found[3], measured={"products": [600e12, 480e12]})
    assert compare.products(found).status == "warn"
    found[3] = replace(found[3], measured={"products": [600e12, 560e12]})
    assert compare.products(found).status == "pass"


def test_all_slow_alike_is_seen_by_the_makers_figure():
    assert compare.products(reports(8, products=[400e12, 400e12])).status == "warn"
    assert compare.products(reports(8, products=[100e12, 100e12])).status == "fail"
    unknown = [changed(report, **{"device kind": "Some GPU"}) for report in reports(8, products=[1e12, 1e12])]
    assert compare.products(unknown).status == "pass"


def test_of_cpus_only_much_slower_ones_are_named():
    found = [changed(report, **{"backend": "cpu", "device kind": "cpu"}) for report in reports(3, products=[1e11])]
    found[1] = replace(found[1], measured={"products": [6e10]})
    assert compare.products(found).status == "pass"
    found[1] = replace(found[1], measured={"products": [3e10]})
    assert (compare.products(found).status, compare.products([]).status) == ("fail", "not checked")


class Service:
    """As JAX's key-value service, between threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, text):
        with self.changed:
            assert key not in self.values
            self.values[key] = text
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


def test_clocks_are_compared_by_asking_for_the_time():
    service, until = Service(), time.monotonic() + 20
    ahead, measured = {1: 0.0, 2: 37.0, 3: -2.5}, {}

    def ask(process):
        meeting = Meeting(service, process, 4)
        measured[process] = meeting.clock(until, lambda: time.time() + ahead.get(process, 0.0))

    threads = [threading.Thread(target=ask, args=(process,)) for process in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process, offset in ahead.items():
        found, unsure = measured[process]
        assert unsure < 1
        assert abs(found - offset) <= unsure + 1e-3


def test_devices_are_asked_for_where_all_can_come():
    imported = passed("import of jax", "")
    found = [replace(report, findings=(imported,)) for report in reports(3)]
    assert compare.obstacle(found) == ""
    assert compare.obstacle([*found, None]) == "not all processes are there"
    broken = replace(found[1], findings=(failed("import of jax", "", ""),))
    assert compare.obstacle([found[0], broken, found[2]]) == "jax cannot be imported by process 1 on nid0001"
    other = changed(found[2], **{"jax-cuda13-plugin": "0.12"})
    assert compare.obstacle([*found[:2], other]) == "processes have different versions of jax-cuda13-plugin"


def test_who_is_silent_is_waited_for_no_longer_than_said():
    meeting, began = Meeting(Service(), 0, 3), time.monotonic()
    assert meeting.collected("topic", "mine", began + 0.2) == ["mine", None, None]
    assert time.monotonic() - began < 10
    assert Meeting(None, 0, 1).collected("topic", "mine", began) == ["mine"]


# ------------------------------------------------------------------------------------------------------------- telling


def test_equal_findings_are_one_line_and_the_others_are_named():
    sound, broken = passed("scratch writable", "a"), failed("scratch writable", "read-only", "another")
    found = [replace(report, findings=(sound,)) for report in reports(6)]
    found[1] = replace(found[1], findings=(passed("scratch writable", "b"),))
    (row,) = rows(found, [])
    assert (row.who, row.finding) == ("", sound)
    found[4] = replace(found[4], findings=(broken,))
    first, second = rows(found, [])
    assert (first.who, first.processes, first.finding) == ("process 4 on nid0002", (4,), broken)
    assert (second.who, second.processes) == ("processes 0, 1, 2, 3, 5 on 2 hosts", (0, 1, 2, 3, 5))
    assert status_of([first, second]) == 1
    assert status_of([second]) == 0
    assert (
        summary([first, second]) == "doctor: failed: scratch writable (1 passed, 0 warnings, 1 failed, 0 not checked)"
    )


def test_many_different_findings_are_counted():
    found = [replace(r, findings=(failed("x", f"in the way of {r.process}", ""),)) for r in reports(40)]
    made = rows(found, [])
    assert len(made) == LINES + 1
    assert made[-1].finding.status == "fail"
    assert len(made[-1].processes) == 40 - LINES


def test_reports_travel_as_text():
    report = replace(reports(1)[0], findings=(failed("a", "Ä", "b"), passed("c", "d")))
    assert Report.from_json(report.to_json()) == report


def test_what_a_probe_that_died_has_not_checked_is_not_passed(monkeypatch):
    monkeypatch.setattr(examine.sys, "executable", "/bin/false")
    found = examine.probed(Report(0, "here", (), {}, {"processes": [1]}), {}, 1.0, lambda found: None)
    by_check = {finding.check: finding for finding in (*found.own.findings, *found.joint)}
    assert by_check["probe"].status == "fail"
    assert "with status 1 at its start" in by_check["probe"].seen
    assert {by_check[check].status for check in checks.OF_PROBE} == {"not checked"}


def test_a_probe_that_never_answers_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'{"begin": "devices"}\'\nexec sleep 100\n')
    script.chmod(0o755)
    monkeypatch.setattr(examine.sys, "executable", str(script))
    monkeypatch.setattr(examine, "PATIENCE", 0.3)
    found = examine.probed(Report(0, "here", (), {}, {"processes": [1]}), {}, 0.1, lambda found: None)
    (probe,) = [finding for finding in found.own.findings if finding.check == "probe"]
    assert probe == Finding("probe", "fail", "no answer at devices, and it was ended", probe.remedy)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "0"], "give 1 to 86400"),
        (["--seconds", "nan"], "give 1 to 86400"),
        (["--seconds", "inf"], "give 1 to 86400"),
        (["--coordinator", "here:1", "--processes", "2"], "belong together"),
        (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "from 0 to 1"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "write it as host:port"),
        (["--site", "lumy"], "lumi"),
    ],
)
def test_options_that_cannot_be(options, said, capsys):
    assert main(["doctor", *options]) == 1
    assert said in capsys.readouterr().err


def test_what_an_import_of_jax_may_take_is_said(capsys):
    """Of the options' text and of the document: both name the constant."""
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert f"two stages' time and {examine.PATIENCE:g} seconds more" in " ".join(capsys.readouterr().out.split())
    document = Path(__file__).parents[2] / "docs/doctor.md"
    assert f"it is ended after 2 N + {examine.PATIENCE:g} seconds" in " ".join(document.read_text().split())


def test_the_command_itself_does_without_jax(tmp_path):
    """All but the probe: what needs no jax is told where jax cannot be imported."""
    script = (
        "import sys\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "from eurollm_jax.cli import main\n"
        "sys.executable = '/bin/false'\n"
        f"sys.exit(main(['doctor', '--site', 'generic-amd', '--scratch', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'pip install "eurollm_jax[rocm]"' in done.stdout
    assert done.stderr == ""
