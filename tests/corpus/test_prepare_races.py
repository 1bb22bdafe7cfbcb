"""Processes that do the same work at once, damage between steps, disks that fill up: nothing wrong gets through."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from eurollm_jax.corpus import folders
from eurollm_jax.corpus.folders import discard_folder, new_folder
from eurollm_jax.corpus.preparing import finalize as finalizing
from eurollm_jax.corpus.preparing import work_plan
from eurollm_jax.corpus.preparing.finalize import finalize
from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare, prepare_task
from eurollm_jax.corpus.preparing.unit import prepare_unit
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(work_plan, "UNIT_BYTES", (20_000, 20_000))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_units(corpus_dir, tokenizer, out, **options):
    prepare_task(corpus_dir, tokenizer, out, PrepareOptions(**options), task=0, of=1, workers=1)
    return out.with_name(f"{out.name}.parts")


def test_sources_that_are_merged_in_several_processes_are_the_same(corpus_dir, tokenizer, tmp_path, monkeypatch):
    for name in ("one", "several"):
        all_units(corpus_dir, tokenizer, tmp_path / name, deduplicate=True)
    finalize(tmp_path / "one", workers=1)
    monkeypatch.setattr(finalizing, "_WORTH_PROCESSES", 0)
    finalize(tmp_path / "several", workers=2)
    files = [tree(tmp_path / name) for name in ("one", "several")]
    assert files[0] == files[1]
    assert len(files[0]) > 50


def test_damage_that_a_merging_process_meets_is_named_and_leaves_nothing(corpus_dir, tokenizer, tmp_path, monkeypatch):
    work = all_units(corpus_dir, tokenizer, tmp_path / "out")
    shard = sorted((work / "units").glob("*/mt/tokens-00000.bin"))[-1]
    shard.write_bytes(shard.read_bytes()[:-2])
    before = tree(work)
    monkeypatch.setattr(finalizing, "_WORTH_PROCESSES", 0)
    with pytest.raises(UserError, match=f"{shard} is damaged; delete its unit's folder and prepare again"):
        finalize(tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"]
    assert tree(work) == before


def test_a_changed_count_in_the_manifest_of_a_unit_is_named(corpus_dir, tokenizer, tmp_path):
    work = all_units(corpus_dir, tokenizer, tmp_path / "out")
    manifest = next((work / "units").glob("*/manifest.json"))
    entry = json.loads(manifest.read_text())
    next(iter(entry["sources"].values()))["characters"] += 1
    manifest.write_text(json.dumps(entry))
    with pytest.raises(UserError, match=f"{manifest} is damaged; delete its unit's folder and prepare again"):
        finalize(tmp_path / "out")


FINALIZE_WITHOUT_LOCKS = """
import errno, fcntl, sys
from pathlib import Path
def none(*_):
    raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = none
from eurollm_jax.corpus.preparing.finalize import finalize
from eurollm_jax.errors import UserError
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(finalize(Path(line.strip()), workers=1).fingerprint, flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def test_several_finalize_at_once_on_a_file_system_without_locks(corpus_dir, tokenizer, store, tmp_path):
    work = all_units(corpus_dir, tokenizer, tmp_path / "units")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", FINALIZE_WITHOUT_LOCKS], **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * 3
    for attempt in range(4):
        out = tmp_path / f"{attempt}" / "out"
        shutil.copytree(work, out.with_name("out.parts"))
        for process in running:
            process.stdin.write(f"{out}\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in running]
        assert said == [store.fingerprint] * 3
        TokenStore.open(out).verify()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    for process in running:
        process.communicate()
        assert process.returncode == 0


def test_a_task_that_fails_leaves_the_plan_to_the_others(corpus_dir, tokenizer, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(corpus_dir, inputs)
    with (inputs / "bg.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    plan = work_plan.make_plan([inputs], tokenizer, out, PrepareOptions())
    plan.settle()  # by another task, which has not begun a unit yet
    last = len(plan.units) - 1
    failing = next(i for i, parts in enumerate(plan.units) if i > 0 and "bg.jsonl" not in parts[-1].input) - 1
    with pytest.raises(UserError, match=r"bg\.jsonl, line 151: field 'text' is a JSON number"):
        prepare_task(inputs, tokenizer, out, task=failing, of=last + 1, workers=1)
    prepare_unit(plan, last, tokenizer, PrepareOptions(), threads=1, tick=lambda _: None)
    before = (plan.unit_folder(last) / "record.json").stat().st_mtime_ns
    prepare_task(inputs, tokenizer, out, PrepareOptions(bad_documents="skip"), task=0, of=1, workers=1)
    assert (plan.unit_folder(last) / "record.json").stat().st_mtime_ns == before
    assert finalize(out).sources["bg"].documents == 150


def test_an_input_that_is_gone_when_its_unit_is_begun_is_named(corpus_dir, tokenizer, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "in")
    plan = work_plan.make_plan([tmp_path / "in"], tokenizer, tmp_path / "out", PrepareOptions())
    plan.settle()
    (tmp_path / "in" / "bg.jsonl").unlink()
    with pytest.raises(UserError, match=r"in/bg\.jsonl cannot be read \(no such file or directory\); mend that"):
        prepare_unit(plan, 0, tokenizer, PrepareOptions(), threads=1, tick=lambda _: None)


def test_a_kill_while_the_plan_is_abandoned_does_not_stand_in_the_way(corpus_dir, tokenizer, store, tmp_path):
    other = work_plan.make_plan([corpus_dir], tokenizer, tmp_path / "out", PrepareOptions(by="origin"))
    other.settle()
    (tmp_path / "out.parts" / "units").rmdir()
    assert prepare(corpus_dir, tokenizer, tmp_path / "out", workers=1).fingerprint == store.fingerprint


def test_a_full_disk_while_units_are_merged_loses_none_of_them(corpus_dir, tokenizer, store, tmp_path):
    work = all_units(corpus_dir, tokenizer, tmp_path / "out")
    before = tree(work)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from eurollm_jax.corpus.preparing.finalize import finalize\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "finalize(Path(sys.argv[1]), workers=1)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"UserError: there is no room to write {tmp_path / 'out'} (file too large)" in done.stderr
    assert "run the same command again: what is done stays" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"]
    assert tree(work) == before
    assert finalize(tmp_path / "out").fingerprint == store.fingerprint


def test_a_disk_that_turns_out_full_when_files_are_synced_is_an_error(corpus_dir, tokenizer, tmp_path, monkeypatch):
    """Network file systems say so only then; the units must not count as done."""
    sync = os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("tokens-00000.bin"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        sync(handle)

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(UserError, match=r"there is no room to write .* \(disk quota exceeded\); free some space"):
        prepare(corpus_dir, tokenizer, tmp_path / "out", workers=1)
    assert list(tmp_path.iterdir()) == []


def test_what_another_machine_left_of_discarding_is_cleared_and_of_writing_is_not(tmp_path):
    for name in (".out.elsewhere.7.partial", f".out.{'0' * 32}.discarded", f".out.more.{'0' * 32}.discarded"):
        (tmp_path / name / "inside").mkdir(parents=True)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", ".out.elsewhere.7.partial", f".out.more.{'0' * 32}.discarded"}
    discard_folder(tmp_path / "out")
    assert "out" not in {path.name for path in tmp_path.iterdir()}
