"""What a run's figures are made of: the machine's peak, time, and the lines of metrics.jsonl."""

import json
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
