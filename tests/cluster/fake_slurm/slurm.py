"""Slurm on one machine: sbatch, srun, squeue, scontrol and scancel that run jobs for real, as local processes.

It knows the options that our scripts use and refuses all others, so that a word that Slurm would not understand fails a
test. What it does is what the manual pages of Slurm say: a job has a process that runs its script (`slurmd` here), a
step's tasks are told who they are by SLURM_ variables, a signal goes to the tasks and not to the script, a job that is
queued again keeps its number, and its script is ended. Run as a script, the first argument is the command.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
OF_SBATCH = {
    *("job-name", "account", "partition", "qos", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gres"),
    *("time", "array", "chdir", "output", "open-mode", "requeue", "signal", "exclude", "exclusive", "mem", "hint"),
    *("constraint", "threads-per-core", "parsable", "dependency", "kill-on-invalid-dep", "gpus-per-task", "comment"),
}
OF_SRUN = {"kill-on-bad-exit", "wait", "cpus-per-task", "cpu-bind", "gpus-per-task", "gpu-bind", "threads-per-core"}
FLAGS = {"requeue", "exclusive", "parsable"}
LIVE = ("PENDING", "RUNNING")


class Refusal(Exception):
    pass


def options_of(words, known):
    """(options, the words after them)."""
    found = {}
    words = list(words)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            raise Refusal(f"unrecognized option '{word}'")
        if not given and name not in FLAGS:
            if not words:
                raise Refusal(f"option '{word}' requires an argument")
            value = words.pop(0)
        found[name] = value
    return found, words


def directives(script):
    """Of the lines before the first that is no comment; what follows a # between words is no option."""
    words = []
    for line in script.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
    found, left = options_of(words, OF_SBATCH)
    if left:
        raise Refusal(f"invalid directive: {left[0]}")
    return found


class Jobs:
    """All jobs, a file each, which its own process alone writes once it has begun."""

    def __init__(self):
        self.folder = Path(os.environ["FAKE_SLURM"])

    def path(self, number, kind="json"):
        return self.folder / f"{number}.{kind}"

    def new_number(self):
        number = int((self.folder / "first").read_text())
        while True:
            with suppress(FileExistsError):
                self.path(number, "taken").touch(exist_ok=False)
                return number
            number += 1

    def write(self, job):
        partial = self.path(job["number"], "partial")
        partial.write_text(json.dumps(job))
        partial.replace(self.path(job["number"]))

    def read(self, number):
        return json.loads(self.path(number).read_text())

    def all(self):
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def of(self, number):
        """The jobs of a number: one, all those of an array, or one of them as ARRAY_TASK. The first job of an array has
        the array's number for its own, and that number means the array."""
        array, _, task = str(number).partition("_")
        return [
            job
            for job in self.all()
            if (str(job["array"]) == array and task in ("", str(job["task"])))
            or (not task and job["array"] is None and str(job["number"]) == array)
        ]


def sbatch(words):
    jobs = Jobs()
    given, rest = options_of(words, OF_SBATCH)
    if len(rest) != 1:
        raise Refusal(f"one script, not {rest}")
    script = Path(rest[0]).absolute()
    if not script.read_text().startswith("#!"):
        raise Refusal("This does not look like a batch script")
    options = {**directives(script), **given}
    chdir = Path(options.get("chdir", os.getcwd()))
    if "output" not in options or not chdir.is_dir():
        raise Refusal(f"no --output, or {chdir} is not there")
    tasks = [None]
    if "array" in options:
        first, last = map(int, options["array"].split("-"))
        tasks = list(range(first, last + 1))
    array = None
    for task in tasks:
        number = jobs.new_number()
        array = number if array is None else array
        copy = jobs.path(number, "script")
        copy.write_bytes(script.read_bytes())
        copy.chmod(0o755)
        jobs.write(
            {
                "number": number,
                "array": array if task is not None else None,
                "task": task,
                "state": "PENDING",
                "restarts": 0,
                "options": options,
                "command": str(script),
                "directory": str(chdir),
                "statuses": [],
            }
        )
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, "slurmd", str(number)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=jobs.path(number, "slurmd").open("w"),
        )
    print(array if "parsable" in options else f"Submitted batch job {array}")


def slurmd(words):
    """Runs one job, as often as it is queued."""
    jobs = Jobs()
    job = jobs.read(words[0])
    number = job["number"]
    if "dependency" in job["options"] and not depends(jobs, job):
        jobs.write({**job, "state": "CANCELLED"})
        return
    while True:
        job["state"] = "RUNNING"
        jobs.write(job)
        status = run_script(jobs, job)
        kill_step(jobs, number, signal.SIGKILL)
        job["statuses"].append(status)
        if jobs.path(number, "cancel").exists():
            job["state"] = "CANCELLED"
        elif jobs.path(number, "requeue").exists():
            jobs.path(number, "requeue").unlink()
            job["state"] = "PENDING"
            job["restarts"] += 1
        else:
            job["state"] = "COMPLETED" if status == 0 else "FAILED"
        jobs.write(job)
        if job["state"] != "PENDING":
            return
        time.sleep(0.1)


def depends(jobs, job):
    """Waits for the jobs of afterok:N; whether all have ended well."""
    kind, _, number = job["options"]["dependency"].partition(":")
    if kind != "afterok":
        raise Refusal(f"dependency {kind}")
    while True:
        states = [one["state"] for one in jobs.of(number)]
        if all(state == "COMPLETED" for state in states):
            return True
        if any(state not in (*LIVE, "COMPLETED") for state in states):
            return False
        if jobs.path(job["number"], "cancel").exists():
            return False
        time.sleep(0.05)


def run_script(jobs, job):
    number, options = job["number"], job["options"]
    nodes, tasks = int(options.get("nodes", 1)), int(options.get("ntasks-per-node", 1))
    array = {} if job["task"] is None else {"ARRAY_JOB_ID": job["array"], "ARRAY_TASK_ID": job["task"]}
    variables = {
        "JOB_ID": number,
        "JOB_NAME": options.get("job-name", "script"),
        "JOB_ACCOUNT": options.get("account", "nobody"),
        "JOB_NUM_NODES": nodes,
        "NNODES": nodes,
        "NTASKS": nodes * tasks,
        "NTASKS_PER_NODE": tasks,
        "TASKS_PER_NODE": tasks if nodes == 1 else f"{tasks}(x{nodes})",
        "JOB_NODELIST": ",".join(["localhost", *(f"node{node}" for node in range(1, nodes))]),
        "JOB_END_TIME": int(time.time()) + seconds_of(options["time"]),
        **({"CPUS_PER_TASK": options["cpus-per-task"]} if "cpus-per-task" in options else {}),
        **({"RESTART_COUNT": job["restarts"]} if job["restarts"] else {}),
        **array,
    }
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in variables.items()}
    names = {"%j": number, "%A": job["array"], "%a": job["task"], "%%": "%"}
    output = re.sub("%[jAa%]", lambda found: str(names[found[0]]), options["output"])
    with (Path(job["directory"]) / output).open("ab" if options.get("open-mode") == "append" else "wb") as log:
        batch = subprocess.Popen(
            [jobs.path(number, "script")],
            env=environment,
            cwd=job["directory"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while batch.poll() is None:
            time.sleep(0.02)
            if jobs.path(number, "requeue").exists() or jobs.path(number, "cancel").exists():
                kill_step(jobs, number, signal.SIGTERM)
                with suppress(ProcessLookupError):
                    os.killpg(batch.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    batch.wait(10)
                    break
                kill_step(jobs, number, signal.SIGKILL)
                with suppress(ProcessLookupError):
                    os.killpg(batch.pid, signal.SIGKILL)
        return batch.wait()


def seconds_of(clock):
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def kill_step(jobs, number, what):
    """To all processes of the step, as slurmstepd does."""
    with suppress(FileNotFoundError):
        for group in map(int, jobs.path(number, "step").read_text().split()):
            with suppress(ProcessLookupError):
                os.killpg(group, what)


def srun(words):
    options, command = options_of(words, OF_SRUN)
    number, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NNODES"])
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    started = []
    for rank in range(nodes * each):
        variables = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank % each,
            "SLURM_NODEID": rank // each,
            "SLURM_STEP_ID": 0,
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_STEP_NUM_NODES": nodes,
            "SLURM_STEP_NUM_TASKS": nodes * each,
            "SLURM_STEP_TASKS_PER_NODE": os.environ["SLURM_TASKS_PER_NODE"],
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        try:
            started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        except FileNotFoundError:
            raise Refusal(f"error: execve(): {command[0]}: No such file or directory") from None
    Jobs().path(number, "step").write_text(" ".join(str(task.pid) for task in started))
    first, wait, kill = None, float(options.get("wait", 0)) or float("inf"), options.get("kill-on-bad-exit") == "1"
    while None in (ended := [task.poll() for task in started]):
        time.sleep(0.02)
        if first is None and any(status is not None for status in ended):
            first = time.monotonic()
        if first is not None and (time.monotonic() > first + wait or (kill and any(ended))):
            for task in started:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
    Jobs().path(number, "step").unlink()
    return max(128 - status if status < 0 else status for status in ended)


def squeue(words):
    if words[:2] != ["--noheader", "--me"] or len(words) != 3:
        raise Refusal(f"unrecognized options {words}")
    form = words[2].removeprefix("--format=")
    for job in Jobs().all():
        if job["state"] in LIVE:
            fields = {"%F": job["array"] or job["number"], "%T": job["state"], "%o": job["command"]}
            print(re.sub("%[FTo]", lambda found, fields=fields: str(fields[found[0]]), form))


def scontrol(words):
    if len(words) != 2 or words[0] != "requeue":
        raise Refusal(f"invalid keyword: {words}")
    (job, *others) = Jobs().of(words[1])
    if others:
        raise Refusal("that would queue all jobs of the array again")
    if "requeue" not in job["options"] or job["state"] != "RUNNING":
        raise Refusal("Requested operation is presently disabled")
    Jobs().path(job["number"], "requeue").touch()


def scancel(words):
    what = [word.removeprefix("--signal=") for word in words if word.startswith("--signal=")]
    for number in words[len(what) :]:
        for job in Jobs().of(number):
            if what:
                kill_step(Jobs(), job["number"], signal.Signals[f"SIG{what[0]}"])
            elif job["state"] in LIVE:
                Jobs().path(job["number"], "cancel").touch()


if __name__ == "__main__":
    name = sys.argv[1]
    try:
        sys.exit({**{each: globals()[each] for each in COMMANDS}, "slurmd": slurmd}[name](sys.argv[2:]) or 0)
    except Refusal as refusal:
        print(f"{name}: {refusal}", file=sys.stderr)
        sys.exit(1)
