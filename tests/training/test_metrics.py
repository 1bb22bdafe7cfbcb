"""What a run's figures are made of: the machine's peak, time, and the lines of metrics.jsonl."""

import json
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from eurollm_jax.training import metrics
from eurollm_jax.training.metrics import Clock, MetricsWriter, peak_of


@pytest.mark.parametrize(
    ("kind", "figure"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM-64GB", 312e12),
        ("AMD Instinct MI250X", 191.5e12),  # one of its two dies
    ],
)
def test_the_peak_of_known_devices_is_their_makers(kind, figure):
    peak = peak_of("bfloat16", kind, 4)
    assert peak.flops == 4 * figure
    assert peak.source == f"its maker's figure, {figure / 1e12:g} TFLOP/s for each device"


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "NVIDIA H100 80GB HBM3"), ("bfloat16", "cpu")])
def test_the_peak_of_anything_else_is_measured(dtype, kind):
    peak = peak_of(dtype, kind, 8)
    assert 1e8 < peak.flops < 1e14  # of a CPU; its maker's figure for the H100 is for other products
    assert peak.source == f"the fastest {dtype} product of 1024 x 1024 matrices at the start"


@pytest.fixture
def passing(monkeypatch):
    """Lets seconds pass on a clock of our own."""
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_clock_leaves_out_what_is_done_between_steps(passing):
    clock = Clock(total=50.0)
    passing(2.0)
    with clock.stopped():
        passing(30.0)
    passing(1.0)
    assert clock.lap() == (3.0, 0.0)
    assert clock.total == 53.0
    passing(0.5)
    assert clock.lap() == (0.5, 0.0)


def test_waiting_for_data_counts_where_no_step_is_under_way(passing):
    clock = Clock(total=0.0)
    done, running = SimpleNamespace(is_ready=lambda: True), SimpleNamespace(is_ready=lambda: False)
    with clock.waiting(running):
        passing(4.0)
    with clock.waiting(done):
        passing(1.0)
    assert clock.lap() == (5.0, 1.0)
    assert clock.lap() == (0.0, 0.0)


def test_what_lies_beyond_the_step_of_a_restart_is_dropped(tmp_path):
    with MetricsWriter(tmp_path, resume_at=0, facts={"peak_flops": 1.0}) as writer:
        writer.write({"kind": "train", "step": 2})
        writer.write({"kind": "train", "step": 4})
    with MetricsWriter(tmp_path, resume_at=2, facts={"peak_flops": 2.0}) as writer:
        writer.write({"kind": "train", "step": 3})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line.get("peak_flops")) for line in lines] == [
        ("start", 0, 1.0),
        ("train", 2, None),
        ("restart", 2, 2.0),
        ("train", 3, None),
    ]


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, caplog):
    """A limit on the size of files stands for the disk: the system refuses in the same way, in the midst of a line."""
    with MetricsWriter(tmp_path, resume_at=0, facts={}) as writer:
        room = (tmp_path / "metrics.jsonl").stat().st_size + 10
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            for step in (1, 2, 3):
                writer.write({"kind": "train", "step": step})
            assert not writer.secure()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert [record["kind"] for record in read(tmp_path)] == ["start"]
        writer.write({"kind": "train", "step": 4})
        assert writer.secure()
    assert [record["step"] for record in read(tmp_path)] == [0, 1, 2, 3, 4]
    assert caplog.text.count("CANNOT BE WRITTEN") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_that_cannot_be_written_do_not_hold_the_run(tmp_path, caplog):
    with MetricsWriter(tmp_path, resume_at=0, facts={}) as writer:
        writer.curves(1, {"loss": 1.0})
        events = writer._board.file_writer.event_writer

        def refuse(*_):
            raise OSError(28, "No space left on device")

        events._ev_writer.write_event = refuse
        writer.curves(2, {"loss": 1.0})
        events._worker.join(60)
        assert not events._worker.is_alive()
        for step in range(3, 100):  # more than its queue takes
            writer.curves(step, {"loss": 1.0})
    assert caplog.text.count("CURVES END HERE") == 1


def read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_curves_do_without_torch_which_can_be_imported_after_them(tmp_path):
    code = (
        "import sys, importlib.util\n"
        "from pathlib import Path\n"
        "from eurollm_jax.training.metrics import MetricsWriter\n"
        "with MetricsWriter(Path(sys.argv[1]), resume_at=0, facts={}) as writer:\n"
        "    writer.curves(1, {'loss': 1.0})\n"
        "assert 'tensorboardX' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "assert importlib.util.find_spec('torch')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list((tmp_path / "tensorboard").iterdir())
