"""`eurollm plan` as a user runs it, and the figures that need no compiler."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from eurollm_jax.cli import main
from eurollm_jax.cluster.plan.collectives import Collective
from eurollm_jax.cluster.plan.plan import Memory, mesh_of, placed, plan, search
from eurollm_jax.cluster.plan.search import meshes
from eurollm_jax.cluster.plan.tables import verdict_words
from eurollm_jax.cluster.plan.work import Phase, bound_of, checkpoint_of, phases, whole_run, work_of
from eurollm_jax.cluster.site import Site
from eurollm_jax.errors import UserError
from eurollm_jax.model.transformer import flops_per_token
from eurollm_jax.parallel.hardware import Chip
from eurollm_jax.parallel.mesh import MESH_AXES, Layout, MeshConfig
from tests.cluster.plans import experiment, with_model

CHIP = Chip("Tiny", (), "cuda", 1e12, 1 << 20, 1e11, 100.0, "")
SITE = Site(
    name="four",
    title="Four",
    chip=CHIP,
    devices_per_node=4,
    processes_per_node=4,
    cores_per_node=None,
    scheduler="none",
    nodes=4,
    link_bandwidth=1e9,
    network_bandwidth=1e8,
    storage_bandwidth=1e6,
    node_watts=50.0,
    pue=1.2,
)
ONE = dict.fromkeys(MESH_AXES, 1)
ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/plan.md", "experiments/eurollm_9b.py", "experiments/eurollm_22b.py")

FILE = '''"""A question."""
from tests.cluster.plans import experiment

EXPERIMENT = experiment()
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(FILE)
    return str(path)


def test_a_plan_is_printed_and_written_without_stores_or_tokenizer(file, tmp_path, capsys):
    figures = tmp_path / "plan.json"
    changed = ["--model.remat", "full", "--model.compute", "bfloat16", "--model.attention-kernel", "auto"]
    status = main(["plan", "--site", "leonardo", "--nodes", "2", file, *changed, "--json", str(figures)])
    told = capsys.readouterr()
    assert status == 0, told.err
    for words in ("Memory of one device", "What a device sends in a step", "At best", "tokens/s at most", "blockwise"):
        assert words in told.out
    plan = json.loads(figures.read_text())
    assert (plan["devices"], plan["nodes"], plan["mesh"]["data"], plan["remat"]) == (8, 2, 8, "full")
    assert plan["memory_of_a_device"]["parameters"] == 4 * plan["parameters"]
    assert plan["memory_of_a_device"]["verdict"] == "fits"
    assert plan["collectives"][0]["axes"] == ["data"]
    assert 0 < plan["share_of_peak"] < 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--mesh", "rows=8"], "'rows' is no axis of a mesh: choose from replica, data"),
        (["--mesh", "fsdp=many"], "fsdp=many must be a whole number"),
        (["--mesh", "data=-5"], "data=-5 must be a whole number of devices: 1 or more, or -1 for what is left"),
        (["--mesh", "data=0"], "data=0 must be a whole number of devices: 1 or more"),
        (["--mesh", "data=²"], "data=² must be a whole number of devices: 1 or more"),
        (["--mesh", "data=2,data=4"], "data is given twice: name each axis once"),
        (["--mesh", "data=-1,fsdp=-1"], "data and fsdp are both -1: one axis alone"),
        (["--json", "nowhere/plan.json"], "--json nowhere/plan.json: name a file in a folder that exists"),
        (["--nodes", "2", "--mesh", "data=3,fsdp=2"], "needs 6 devices, and there are 8"),
        (["--nodes", "2", "--devices", "9"], "--nodes 2 of Leonardo Booster have 8 devices, and --devices says 9"),
        (["--devices", "6"], "do not fill nodes of 4 on Leonardo Booster: take 4 or 8"),
        (["--nodes", "0"], "--nodes 0 must be 1 or more"),
        (["--nodes", "6"], "a batch of 16 rows does not divide over 24 devices"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, told, file, capsys):
    assert main(["plan", "--site", "leonardo", *options, file]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize("options", [["--mesh", "data=0"], ["--json", "nowhere/plan.json"]])
def test_what_cannot_be_starts_no_process(options, file, monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    assert main(["plan", "--site", "leonardo", *options, file]) == 1


class Compiling(Exception):
    """All that stands before the compiler was passed."""


def shown():
    """The arguments of each `eurollm plan` in the documents."""
    text = "".join(Path(ROOT, name).read_text() for name in DOCUMENTS)
    return re.findall(r"^ *eurollm plan (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", shown())
def test_commands_of_the_documents_pass_up_to_the_compiler(line, monkeypatch):
    def stop(request):
        for one, rows in request.steps:
            sizes = (*one.batch_sizes.until(one.total_rows).sizes, rows)
            layout = Layout(one.mesh.build(range(request.devices)))
            layout.require_batches(sizes, one.data.sequence_length)
            assert not [size for size in sizes if size % (layout.ways("batch") * one.accumulate)], sizes
        raise Compiling

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("eurollm_jax.cluster.plan.plan.compile_elsewhere", stop)
    with pytest.raises(Compiling):
        main(["plan", *shlex.split(line)])


@pytest.mark.parametrize(
    ("peak", "compiled", "exact", "verdict", "reason"),
    [
        (90, 100, False, "fits", "90% of it"),
        (91, 50, False, "unsure", "91% of it, and the model may err by 10%"),
        (25, 208, False, "unsure", "25% of it by the model; as compiled for this CPU, which widens bfloat16, it would"),
        (101, 50, False, "does not fit", "101% of it"),
        (100, 100, True, "fits", "100% of it"),
        (101, 101, True, "does not fit", "101% of it"),
    ],
)
def test_a_verdict_heeds_the_margin_and_what_was_compiled(peak, compiled, exact, verdict, reason):
    memory = Memory(SimpleNamespace(peak=compiled), None, 100.0, 0.9, peak, exact)
    assert memory.verdict == verdict
    assert verdict_words(memory).startswith(reason)
    assert dataclasses.replace(memory, budget=None).verdict is None


@pytest.mark.parametrize("fraction", ["0", "1.5", "-0.5", "nan", "much"])
def test_a_share_of_the_memory_is_above_none_and_at_most_all(fraction, monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    site = dataclasses.replace(SITE, environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction})
    for planned in (plan, search):
        with pytest.raises(UserError, match=f"site four: XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} must be"):
            planned(experiment(), site, 4)


@pytest.mark.slow
def test_this_computer_is_one_node_of_what_is_asked_for(file, tmp_path, capsys):
    figures = tmp_path / "plan.json"
    assert main(["plan", "--devices", "2", "--json", str(figures), file]) == 0, capsys.readouterr().err
    told = json.loads(figures.read_text())
    assert (told["nodes"], told["devices"]) == (1, 2)
    assert {one["nodes"] for one in told["collectives"]} == {1}
    assert "between nodes" not in capsys.readouterr().out.replace("network between nodes", "")
    assert main(["plan", "--nodes", "2", file]) == 1
    assert "this computer is one node: say how many with --devices" in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would():
    tight = dataclasses.replace(SITE, chip=dataclasses.replace(CHIP, memory=2_300_000))
    big = with_model(experiment(rows=64, mesh=MeshConfig(data=8)), compute="bfloat16", attention_kernel="auto")
    made = plan(big, tight, 8)
    assert made.memory.verdict == "does not fit"
    by_name = {remedy.what: remedy for remedy in made.remedies}
    assert {"fsdp=2", "remat=attention", "accumulate=2"} <= by_name.keys()
    assert all(remedy.peak < made.memory.peak for remedy in made.remedies if "memory" not in remedy.what)
    for remedy in made.remedies:
        if "=" in remedy.what:
            assert (remedy.verdict == "does not fit") == (remedy.peak > made.memory.budget)
            assert (remedy.verdict == "fits") == (remedy.peak <= 0.9 * made.memory.budget)
    assert by_name["fsdp=2"].options == "--mesh data=4,fsdp=2"
    sharper = plan(dataclasses.replace(big, mesh=mesh_of("data=4,fsdp=2")), tight, 8)
    assert sharper.memory.peak == pytest.approx(by_name["fsdp=2"].peak, rel=0.02)


def test_devices_follow_from_nodes_from_the_mesh_or_from_one_node():
    one = experiment()
    assert placed(one, SITE, 3, None, None) == 12
    assert placed(one, SITE, None, 8, None) == 8
    assert placed(one, SITE, None, None, None) == 4
    assert placed(one, SITE, None, None, mesh_of("data=2,fsdp=8")) == 16
    assert mesh_of("fsdp=4, tensor=2") == MeshConfig(fsdp=4, tensor=2)
    assert mesh_of("fsdp=-1") == MeshConfig(data=1, fsdp=-1)
    with pytest.raises(UserError, match="do not fill nodes"):
        placed(one, SITE, None, 6, None)


def test_a_ramp_has_its_phases():
    one = experiment(rows=8, batch_ramp=((32, 16), (100, 32)), steps=12)
    assert phases(one) == (Phase(8, 4), Phase(16, 5), Phase(32, 3))
    assert sum(phase.rows * phase.steps for phase in phases(one)) == one.total_rows
    assert phases(dataclasses.replace(one, steps=4)) == (Phase(8, 4),)


def test_days_energy_and_checkpoints_add_up():
    one = experiment(steps=100, checkpoint_every=10)
    run = whole_run(one, {16: 36.0}, SITE, 8)
    assert run.tokens == 100 * 16 * 64
    assert run.days == pytest.approx(1 / 24)
    assert run.device_hours == pytest.approx(8)
    assert run.megawatt_hours == pytest.approx((8 * 100 + 2 * 50) * 1.2 / 1e6)
    assert whole_run(one, {16: None}, SITE, 8).days is None
    saved = checkpoint_of(one, 7 * 10**6, 36.0, SITE)
    assert (saved.seconds, saved.every) == (7.0, 360.0)
    assert checkpoint_of(one, 7, 36.0, dataclasses.replace(SITE, storage_bandwidth=None)).seconds is None


def test_the_bound_is_the_slowest_part():
    one = with_model(experiment(), compute="bfloat16")
    work = work_of(one, 16, "blockwise")
    assert work.model_flops == 16 * 64 * flops_per_token(one.model, 64)
    ring = Collective("all-reduce", ("data",), 8, 2, "f32", 1e6, 1)
    bound = bound_of(one, work, {**ONE, "data": 8}, SITE, [ring], 1e6)
    assert bound.compute == pytest.approx(work.flops / 8e12)
    assert bound.network == pytest.approx(2 * 1e6 / 2 / 1e8)  # half of it, both ways, of one group
    assert bound.links == pytest.approx(2 * 1e6 * 3 / 4 / 1e9)
    assert (bound.seconds, bound.by) == (bound.network, "network")
    unknown = dataclasses.replace(SITE, chip=dataclasses.replace(CHIP, bfloat16=None))
    assert bound_of(one, work, {**ONE, "data": 8}, unknown, [ring], 1e6).seconds is None


def test_recomputation_grows_with_the_policy():
    one = with_model(experiment(), attention_kernel="blockwise")
    needed = {remat: work_of(with_model(one, remat=remat), 16, "blockwise").flops for remat in ("none", "dots", "full")}
    assert needed["none"] < needed["dots"] < needed["full"]


def test_meshes_divide_what_they_split():
    found = list(meshes(experiment(rows=8), SITE, 8))
    assert all(mesh["tensor"] <= 4 and mesh["data"] * mesh["fsdp"] * mesh["expert"] <= 8 for mesh in found)
    assert {**ONE, "data": 2, "fsdp": 2, "tensor": 2} in found
    assert {**ONE, "data": 8} in found
    assert not any(mesh["expert"] > 1 for mesh in found)


@pytest.mark.slow
def test_a_search_ranks_and_says_what_is_compiled(file, tmp_path, capsys):
    figures = tmp_path / "search.json"
    asked = ["plan", "--site", "leonardo", "--nodes", "2", "--search", "--json", str(figures), file]
    assert main(asked) == 0, capsys.readouterr().err
    told = json.loads(figures.read_text())
    assert sum(one["compiled"] for one in told) == 3
    assert "Ranked by bound" in capsys.readouterr().out
    compiled = [one["bound_seconds"]["step"] for one in told if one["compiled"]]
    assert compiled == sorted(compiled)
