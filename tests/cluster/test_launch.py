"""What a job script does when it runs, under a scheduler that runs it for real, with a program in eurollm's place that
ends as it is told; and what `eurollm launch` makes of the command line."""

import json
import sys
from dataclasses import replace

import pytest

from eurollm_jax.cluster.launch import slurm
from eurollm_jax.cluster.launch.submit import launch
from eurollm_jax.errors import UserError
from tests.cluster.fake_slurm.cluster import Cluster
from tests.cluster.test_launch_scripts import CPU, training

# Notes its arguments and ends with the status that is its job's turn; task 0 of a step counts the starts.
PROGRAM = """#!{python} -SE
import json, os, sys, time
rank, start = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
names = ("SLURM_ARRAY_TASK_ID", "SLURM_CPUS_PER_TASK", "PLACE")
seen = {{name: os.environ.get(name) for name in names}}
name = f"{{os.environ['SLURM_JOB_ID']}}-{{start}}-{{rank}}.json"
with open(os.path.join({folder!r}, name), "w") as file:
    json.dump({{"argv": sys.argv[1:], **seen}}, file)
print("rank", rank, "start", start, flush=True)
if rank == "0" and os.environ["SLURM_NTASKS"] != "1":
    time.sleep(0.3)
    print("process 1 is gone", flush=True)
if "GROWS" in os.environ:
    os.makedirs(os.path.join(os.environ["GROWS"], str(100 * min(start, 6))), exist_ok=True)
statuses = {statuses!r}
sys.exit(statuses[min(start, len(statuses) - 1)])
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "FOLLOW_SECONDS", 0.02)
    with Cluster(tmp_path / "slurm", monkeypatch) as cluster:
        yield cluster


@pytest.fixture
def job_of(tmp_path):
    """A job that ends with these statuses, start by start; what its processes saw is in `seen`."""

    def make(*statuses, **changed):
        program, seen = tmp_path / f"python for {statuses}", tmp_path / "seen"
        seen.mkdir(exist_ok=True)
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(seen), statuses=statuses))
        program.chmod(0o755)
        where = {"folder": tmp_path / "runs" / "x.launch", "directory": tmp_path, "python": str(program)}
        small = {"nodes": 1, "tasks_per_node": 1, "cores": 2, "seconds": 600, "arguments": ("x.py",)}
        return training(CPU, **where, **{**small, **changed})

    return make


def seen(job):
    return [json.loads(path.read_text()) for path in sorted((job.directory / "seen").iterdir())]


def log(job):
    return "".join(path.read_text() for path in sorted(job.logs.glob("*.out")))


def said_by_ranks(text):
    return [line for line in text.splitlines() if line.startswith("rank")]


def submitted(cluster, *jobs, site=CPU):
    assert launch(site, jobs) == 0
    return cluster.ended()


def test_a_job_that_was_stopped_is_queued_again_and_then_ends(cluster, job_of):
    job = job_of(75, 75, 0)
    (ended,) = submitted(cluster, job)
    assert (ended["state"], ended["restarts"]) == ("COMPLETED", 2)
    assert said_by_ranks(log(job)) == [f"rank 0 start {start}" for start in range(3)]
    assert (job.logs / f"{ended['number']}.status").read_text() == "0\n"


@pytest.mark.parametrize("status", [1, 2, 130])
def test_what_a_user_has_to_mend_is_not_tried_again(cluster, job_of, status):
    job = job_of(status)
    (ended,) = submitted(cluster, job)
    assert (ended["state"], ended["restarts"], ended["statuses"]) == ("FAILED", 0, [status])


def test_lost_processes_are_tried_again_until_it_is_no_chance(cluster, job_of):
    job = job_of(76, 137, 139, 75, 76, 143, 134, 138, 76, 0)
    (ended,) = submitted(cluster, job)
    assert (ended["state"], ended["restarts"]) == ("FAILED", 8)  # three, a stop, and five in a row
    assert "5 starts in a row have lost a process" in log(job)
    (lost,) = job.logs.glob("*.lost")
    assert [line.split()[2] for line in lost.read_text().splitlines()] == ["76", "143", "134", "138", "76"]


def test_losses_with_a_checkpoint_between_them_are_not_in_a_row(cluster, job_of, tmp_path):
    checkpoints = tmp_path / "a run" / "checkpoints"
    (checkpoints / "0090").mkdir(parents=True)
    (checkpoints / "9999.orbax-checkpoint-tmp-0").mkdir()
    job = job_of(137, checkpoints=checkpoints)
    (ended,) = submitted(cluster, job, site=replace(CPU, environment={"GROWS": str(checkpoints)}))
    assert (ended["state"], ended["restarts"]) == ("FAILED", 10)  # six come further, and five in a row do not
    (lost,) = job.logs.glob("*.lost")
    assert [line.split()[-1] for line in lost.read_text().splitlines()] == ["600"] * 5


def test_work_that_is_ended_at_its_time_goes_on_as_often_as_it_takes(cluster, job_of):
    by_time, lost = (138,) * 7, (137,) * 5
    (ended,) = submitted(cluster, job_of(*by_time, 0, piecemeal=True, ends_in_time=False))
    assert (ended["state"], ended["restarts"]) == ("COMPLETED", 7)
    other = replace(job_of(*lost, 0, piecemeal=True, ends_in_time=False), file="lost.sbatch")
    assert submitted(cluster, other)[-1]["state"] == "FAILED"


def test_a_start_that_comes_to_no_step_has_no_status(cluster, job_of, capsys):
    site = replace(CPU, environment={"PLACE": "$(test ${SLURM_RESTART_COUNT:-0} = 0)"})
    job = job_of(75)
    assert launch(site, [job], follow=True) == 1
    assert "has ended before its processes did" in capsys.readouterr().err
    assert not list(job.logs.glob("*.status"))


def test_who_ceases_to_follow_is_told_what_the_same_command_does(cluster, job_of, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "follow", interrupted)
    job = job_of(0)
    assert launch(CPU, [job], follow=True) == 130
    (ended,) = cluster.ended()
    said = capsys.readouterr().err
    assert f"job {ended['number']} goes on: the same command follows it while it is there, and submits" in said
    assert f"tail -f {job.logs / str(ended['number'])}.out" in said


def test_a_job_whose_cores_are_not_known_is_warned_of(cluster, job_of, capsys):
    assert launch(CPU, [job_of(0)], dry_run=True) == 0
    assert not capsys.readouterr().err
    assert launch(CPU, [job_of(0, cores=None)], dry_run=True) == 0
    assert "may give each process one core: set cores_per_node" in capsys.readouterr().err


def test_restarts_have_an_end(cluster, job_of):
    job = job_of(75, restarts=2)
    (ended,) = submitted(cluster, job)
    assert (ended["state"], ended["restarts"]) == ("FAILED", 2)
    assert "started 3 times" in log(job)


def test_words_arrive_as_they_were_written(cluster, job_of):
    words = ("exp eriment.py", "--name", "it's", "--x", '"$HOME" `id` \\ #', "", "*", "δ")
    job = job_of(0, arguments=words)
    site = replace(CPU, environment={"PLACE": "$SLURM_JOB_ACCOUNT/$(echo here) 'a' \"b\""})
    submitted(cluster, job, site=site)
    (one,) = seen(job)
    assert one["argv"][:4] == ["-m", "eurollm_jax", "train", "--time-limit"]
    assert one["argv"][4] in ("0:10:00", "0:09:59", "0:09:58")
    assert tuple(one["argv"][5:]) == words
    assert one["PLACE"] == "project_1/here 'a' \"b\""
    assert one["SLURM_CPUS_PER_TASK"] == "2"


def test_every_task_of_every_node_runs(cluster, job_of):
    job = job_of(0, nodes=2, tasks_per_node=3)
    submitted(cluster, job)
    assert len(seen(job)) == 6


def test_a_process_outlives_the_one_that_it_names(cluster, job_of):
    job = job_of(76, tasks_per_node=2, restarts=0)
    (ended,) = submitted(cluster, job)
    assert ended["statuses"] == [76]
    assert "process 1 is gone" in log(job)


def test_a_second_job_of_the_same_run_is_refused_by_name(cluster, job_of, capsys):
    job = job_of(0, own="--hold; sleep 600;")  # the step does not end by itself
    launch(CPU, [job])
    cluster.until(lambda: [one for one in cluster.jobs() if one["state"] == "RUNNING"])
    (first,) = cluster.jobs()
    with pytest.raises(UserError, match=rf"job {first['number']} \(RUNNING\) is of .* already"):
        launch(CPU, [job])
    assert len(cluster.jobs()) == 1
    other = replace(job_of(0), folder=job.folder.with_name("y.launch"))
    assert launch(CPU, [other]) == 0


def test_following_prints_the_log_over_all_starts_and_ends_like_the_job(cluster, job_of, capsys):
    job = job_of(75, 1)
    assert launch(CPU, [job], follow=True) == 1
    out = capsys.readouterr().out
    assert said_by_ranks(out) == ["rank 0 start 0", "rank 0 start 1"]


def test_a_dependent_job_begins_when_all_tasks_have_ended_well(cluster, job_of):
    first = job_of(75, 0, array=3, own='--task "$SLURM_ARRAY_TASK_ID" --of 3', file="one.sbatch", ends_in_time=False)
    second = job_of(75, 0, file="two.sbatch", arguments=("finish",))
    ended = submitted(cluster, first, second)
    assert [job["state"] for job in ended] == ["COMPLETED"] * 4
    tasks = {tuple(one["argv"][3:]) for one in seen(first) if one["SLURM_ARRAY_TASK_ID"]}
    assert tasks == {("--task", str(task), "--of", "3", "x.py") for task in range(3)}
    assert len(list(first.logs.glob("*_?.out"))) == 3


def test_a_dependent_job_does_not_begin_where_a_task_has_failed(cluster, job_of):
    first = job_of(1, array=2, file="one.sbatch")
    ended = submitted(cluster, first, job_of(0, file="two.sbatch"))
    assert [job["state"] for job in ended] == ["FAILED", "FAILED", "CANCELLED"]


def test_a_dry_run_prints_the_script_and_writes_nothing(cluster, job_of, capsys):
    job = job_of(0)
    assert launch(CPU, [job], dry_run=True) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not job.folder.exists()
    assert not cluster.jobs()


def test_what_sbatch_refuses_is_said(cluster, job_of):
    with pytest.raises(UserError, match=r"sbatch refuses .*unrecognized option '--nodse=2'"):
        launch(CPU, [job_of(0, options=("--nodse=2",))])


def test_without_a_scheduler_there_is_a_word_for_it(job_of, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no squeue here"):
        launch(CPU, [job_of(0)])


def test_a_launch_from_inside_a_job_hands_none_of_its_variables_on(cluster, job_of, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "99")
    job = job_of(0)
    submitted(cluster, job)
    (one,) = seen(job)
    assert one["SLURM_CPUS_PER_TASK"] == "2"
    assert "rank 0 start 0" in log(job)
