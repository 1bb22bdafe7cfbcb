"""From jobs to the scheduler: scripts are written beside what they make, and no second job is queued for the same."""

import shlex
import sys
from collections.abc import Sequence

from eurollm_jax.cluster.launch import slurm
from eurollm_jax.cluster.launch.job import Job, require_fitting
from eurollm_jax.cluster.launch.script import render
from eurollm_jax.cluster.site import Site
from eurollm_jax.errors import UserError


def launch(site: Site, jobs: Sequence[Job], *, dry_run: bool = False, follow: bool = False) -> int:
    """Says what a user of the site must know, submits the jobs, each to begin when the one before has ended well, and
    returns an exit status: with `follow`, that of the last one, once it has ended. With `dry_run` the scripts are
    printed, and nothing is written.

    Where jobs of these scripts wait or run already, `follow` follows them; without it UserError names them.
    """
    for job in jobs:
        require_fitting(site, job)
    for note in site.notes:
        print(f"{site.name}: {note}", file=sys.stderr)
    if any(job.cores is None for job in jobs):
        print(
            f"{site.name}: --cpus-per-task is not given, and Slurm may give each process one core: set cores_per_node "
            "in a site file (docs/sites.md)",
            file=sys.stderr,
        )
    if dry_run:
        print("\n".join(render(site, job) for job in jobs), end="")
        return 0
    there = [(one.id, job, one.state) for one in slurm.queued() for job in jobs if one.script == str(job.script)]
    if there and not follow:
        named = ", ".join(f"{number} ({state})" for number, _, state in there)
        raise UserError(
            f"job {named} is of {jobs[-1].folder} already: wait for it, end it with scancel {there[0][0]}, or add "
            "--follow to see its log."
        )
    if there:
        print(f"job {', '.join(number for number, _, _ in there)} is there already; nothing is submitted", flush=True)
        submitted = [(number, job) for number, job, _ in sorted(there, key=lambda one: jobs.index(one[1]))]
    else:
        submitted = _submitted(site, jobs)
    if not follow:
        return 0
    try:
        return slurm.follow(submitted)
    except KeyboardInterrupt:
        number, job = submitted[-1]
        print(
            f"job {number} goes on: the same command follows it while it is there, and submits the next one once it "
            f"has ended; tail -f {shlex.quote(str(job.logs / _log(number, job)))} follows it alone",
            file=sys.stderr,
        )
        return 130


def _submitted(site: Site, jobs: Sequence[Job]) -> list[tuple[str, Job]]:
    for job in jobs:
        job.logs.mkdir(parents=True, exist_ok=True)
        job.script.write_text(render(site, job), encoding="utf-8")
    found: list[tuple[str, Job]] = []
    for job in jobs:
        number = slurm.submit(job, found[-1][0] if found else None)
        found.append((number, job))
        print(f"job {number}: {job.title}")
        print(f"  script {job.script}, log {job.logs / _log(number, job)}")
    numbers = [number for number, _ in found]
    print(f"Look: squeue --jobs {','.join(numbers)}   End: scancel {' '.join(numbers)}", flush=True)
    return found


def _log(number: str, job: Job) -> str:
    return f"{number}.out" if job.array is None else f"{number}_*.out"
