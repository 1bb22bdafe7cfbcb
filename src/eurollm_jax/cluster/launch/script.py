"""The text of a job script, with a reason beside whatever is not plain.

The script is all that runs: it can be read, changed, kept, and handed to sbatch without us. What the user names (paths,
fields of an experiment) is quoted so that it arrives as it was written; what a site's profile says may hold variables
of the shell, and stands between double quotes.
"""

import shlex
from collections.abc import Iterable, Iterator

from eurollm_jax import __version__
from eurollm_jax.cluster.launch.job import Job, clock, container_of
from eurollm_jax.cluster.site import Site, for_bash
from eurollm_jax.parallel.flags import FLAGS, FRACTION_VARIABLE, JAX_FRACTION, MEMORY_FRACTION, xla_flags
from eurollm_jax.parallel.rendezvous import START_SECONDS

LOST_REASON = "a process hung, or was killed: a few in a row may be chance"
LOST_IN_A_ROW = 5  # starts that end by a lost process, after which the cause is not chance
WAIT_SECONDS = START_SECONDS + 120  # that processes may end apart: one may fail before it comes to the others, who wait

STOPPED, TOLD, LOST = 75, 138, (76, 134, 137, 138, 139, 143)  # statuses: docs/runs.md; 138: killed by SIGUSR1
PLATFORMS = "JAX_PLATFORMS"


def render(site: Site, job: Job) -> str:
    """The whole script, which ends with a newline."""
    parts = (
        _head(site, job),
        _reasons(job),
        _shell(site, job),
        _modules(site),
        _environment(site, job),
        _container(site, job),
        _time(job),
        _step(site, job),
        _ending(job),
    )
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _head(site: Site, job: Job) -> Iterator[str]:
    yield "#!/bin/bash -l" if site.modules else "#!/bin/bash"  # a login shell knows `module`
    yield f"# {job.title}"
    yield f"# Written by `eurollm launch` {__version__} for {site.title}."
    yield from (f"#SBATCH {option}" for option in _options(site, job))


def _options(site: Site, job: Job) -> Iterator[str]:
    yield f"--job-name={_directive(job.name)}"
    if job.account is not None:
        yield f"--account={_directive(job.account)}"
    if partition := job.partition or (site.partition if job.on_devices else None):
        yield f"--partition={_directive(partition)}"
    if qos := job.qos or (site.qos if job.on_devices else None):
        yield f"--qos={_directive(qos)}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.tasks_per_node}"
    if job.cores is not None:
        yield f"--cpus-per-task={job.cores}"
    if job.on_devices:
        yield from site.options
    yield f"--time={clock(job.seconds)}"
    if job.array is not None:
        yield f"--array=0-{job.array - 1}"
    yield f"--chdir={_directive(str(job.directory))}"
    yield f"--output={_directive(_log_pattern(job))}"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=USR1@{job.save_seconds}"
    yield from map(_directive, job.options)


def _log_pattern(job: Job) -> str:
    """A percent sign of the folder's own is doubled: sbatch replaces the others."""
    return f"{str(job.logs).replace('%', '%%')}/{'%j' if job.array is None else '%A_%a'}.out"


def _directive(text: str) -> str:
    """As sbatch reads it: between double quotes where there is anything that it would divide at or cut off."""
    plain = all(character.isalnum() or character in "-_.,:=/+%@[]" for character in text)
    return text if plain else '"' + text.replace("\\", "\\\\") + '"'


def _reasons(job: Job) -> Iterator[str]:
    yield "# open-mode: a job that is queued again keeps its number, and its log goes on."
    yield "# requeue: Slurm may start this job again where a node fails; the end of this script asks for it otherwise."
    if job.ends_in_time:
        yield f"# signal: {job.save_seconds} s before the end the processes, not this script, are told to save and to"
        yield "#   end with 75. Where that takes longer, --time-limit below has had them do so before."
    else:
        yield f"# signal: {job.save_seconds} s before the end what runs is ended; the next start does the rest."


def _shell(site: Site, job: Job) -> Iterator[str]:
    yield "set -euo pipefail"
    yield ""
    yield f"folder={shlex.quote(str(job.folder))}"
    if job.array is None:
        yield "job=$SLURM_JOB_ID"
    else:
        yield "# One task of an array has the number of the array as its own, which would name all of them."
        yield "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    yield 'log="$folder/logs/$job"'
    yield "restarts=${SLURM_RESTART_COUNT:-0}"
    yield "# What an earlier start ended with is not what this one does."
    yield 'rm -f "$log.status"'
    if site.scratch is not None:
        yield f"scratch_folder={for_bash(site.scratch)}"
        yield 'mkdir -p "$scratch_folder"'


def _modules(site: Site) -> Iterator[str]:
    if not site.modules:
        return
    yield "# The module command reads variables that may not be set."
    yield "set +u"
    yield from (f"module load {shlex.quote(module)}" for module in site.modules)
    yield "set -u"


def _environment(site: Site, job: Job) -> Iterator[str]:
    if site.environment and job.on_devices:
        yield f"# What {site.title} asks for (docs/sites.md)."
        for name, value in site.environment.items():
            if "$(" in value:  # of a command that fails `export` would not end with the status
                yield f"{name}={for_bash(value)}"
                yield f"export {name}"
            else:
                yield f"export {name}={for_bash(value)}"
        yield ""
    if site.internet != "everywhere":
        yield "# Compute nodes reach no hub: what asks for one fails at once, and does not wait."
        yield "export HF_HUB_OFFLINE=1"
        yield ""
    yield "# Packages in the user's home directory do not mix with those that are meant."
    yield "export PYTHONNOUSERSITE=1"
    if not (job.on_devices and "PYTHONPATH" in site.environment):
        if job.image is None and job.python_path:
            yield "# Nor do those of modules: this is what eurollm was launched with."
            yield f"export PYTHONPATH={shlex.quote(job.python_path)}"
        else:
            yield "# Nor do those of modules, or of the shell that this was launched from."
            yield "unset PYTHONPATH"
    yield "# The log is written line by line, also where it is a file."
    yield "export PYTHONUNBUFFERED=1"
    if not job.on_devices:
        return
    if site.chip.backend != "cpu" and PLATFORMS not in site.environment:
        yield "# Where there is no device the job ends; JAX alone would go on with the CPU."
        if job.fits_on_cpu:
            yield "# The second: the laws of a study are fitted there in 64 bits."
        yield f"export {PLATFORMS}={site.chip.backend}{',cpu' if job.fits_on_cpu else ''}"
    if site.scratch is not None:
        yield "# Programs that were compiled are found again by the next start; homes are too small for them."
        yield 'export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$scratch_folder/eurollm_jax/xla}"'
    if flags := FLAGS[site.chip.backend]:
        yield "# XLA's flags, after those that are set already:"
        yield from (f"#   {flag.name}: {flag.reason}" for flag in flags)
        yield f'export XLA_FLAGS="${{XLA_FLAGS:+$XLA_FLAGS }}{xla_flags(site.chip.backend)}"'
    if site.chip.backend != "cpu" and FRACTION_VARIABLE not in site.environment:
        yield f"# Of a GPU's memory; JAX alone would take {JAX_FRACTION}. The rest is for communication and the driver."
        yield "unset XLA_CLIENT_MEM_FRACTION  # jaxlib refuses both names at once"
        yield f"export {FRACTION_VARIABLE}={MEMORY_FRACTION}"


def _container(site: Site, job: Job) -> Iterator[str]:
    if job.image is None:
        return
    container = container_of(site)
    yield "# Paths that must be seen inside, under the same names."
    binds = [*container.binds, *(["$scratch_folder"] if site.scratch is not None else []), "$PWD"]
    mounts = shlex.quote("".join(f",{folder}" for folder in job.mounts)) if job.mounts else ""
    yield f"binds={for_bash(','.join(dict.fromkeys(binds)))}{mounts}"
    yield f'container=({shlex.join(container.command.split())} --bind "$binds" {shlex.quote(job.image)})'


def _time(job: Job) -> Iterator[str]:
    if not job.ends_in_time:
        return
    yield "# What is left until Slurm ends this job. An old Slurm does not say when that is."
    yield "now=$(date +%s)"
    yield f"left=$((${{SLURM_JOB_END_TIME:-$((now - SECONDS + {job.seconds}))}} - now))"
    yield "printf -v time_limit '%d:%02d:%02d' $((left / 3600)) $((left % 3600 / 60)) $((left % 60))"


def _step(site: Site, job: Job) -> Iterator[str]:
    yield 'echo "job $job, start $((restarts + 1)), on $SLURM_JOB_NODELIST, $(date "+%Y-%m-%dT%H:%M:%S%z")"'
    yield "# kill-on-bad-exit, wait: where a process fails, the others say which one it was, and end by themselves."
    if job.cores is not None:
        yield "# cpus-per-task: since Slurm 22.05 a step does not have it from its job."
    yield "status=0"
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}"]
    words += ['--cpus-per-task="$SLURM_CPUS_PER_TASK"'] if job.cores is not None else []
    words += map(shlex.quote, _step_options(site, job))
    yield f"{' '.join(words)} \\"
    if job.image is not None:
        yield '  "${container[@]}" \\'
        program = ["python", "-m", "eurollm_jax"]
    else:
        program = [job.python, "-m", "eurollm_jax"]
    yield f"  {shlex.join([*program, *job.command])} \\"
    if own := " ".join(filter(None, (job.own, '--time-limit "$time_limit"' if job.ends_in_time else ""))):
        yield f"  {own} \\"
    yield f"  {shlex.join(job.arguments)} || status=$?"
    yield 'echo "$status" > "$log.status"'


def _step_options(site: Site, job: Job) -> Iterator[str]:
    """A binding of the site's is for its own number of processes: another one would have the cores of the first."""
    if job.on_devices:
        alike = job.tasks_per_node == site.processes_per_node
        yield from (option for option in site.step_options if alike or not option.startswith("--cpu-bind"))


def _ending(job: Job) -> Iterator[str]:
    if job.checkpoints is not None:
        yield f"checkpoints={shlex.quote(str(job.checkpoints))}"
    stopped = (STOPPED, TOLD) if job.piecemeal else (STOPPED,)
    yield "again=no"
    yield "case $status in"
    yield f"  {_any_of(stopped)}) # {'what is done is saved' if job.piecemeal else 'all is saved'}"
    yield '    rm -f "$log.lost"'
    yield "    again=yes"
    yield "    ;;"
    yield f"  {_any_of(status for status in LOST if status not in stopped)}) # {LOST_REASON}"
    line = '$(date "+%Y-%m-%dT%H:%M:%S%z") status $status on $SLURM_JOB_NODELIST'
    if job.checkpoints is not None:
        yield from _newest()
        line += ", newest checkpoint $newest"
    yield f'    echo "{line}" >> "$log.lost"'
    yield f'    if (($(wc -l < "$log.lost") < {LOST_IN_A_ROW})); then'
    yield "      again=yes"
    yield "    else"
    yield f'      echo "{LOST_IN_A_ROW} starts in a row have lost a process: look at $log.lost, then launch it again"'
    yield "    fi"
    yield "    ;;"
    yield "esac"
    yield "if [[ $again == yes ]]; then"
    yield f"  if ((restarts >= {job.restarts})); then"
    yield f'    echo "this job has started {job.restarts + 1} times: launch it again to go on"'
    yield '  elif ! scontrol requeue "$job"; then'
    yield '    echo "this job cannot be queued again: launch it again to go on"'
    yield "  fi"
    yield "fi"
    yield 'exit "$status"'


def _any_of(statuses: Iterable[int]) -> str:
    return "|".join(map(str, statuses))


def _newest() -> Iterator[str]:
    """The step of the newest checkpoint; where it is a later one than at the last loss, that one was not in a row."""
    yield "    newest=0"
    yield '    for checkpoint in "$checkpoints"/*; do'
    yield "      step=${checkpoint##*/}"
    yield "      if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi"
    yield "    done"
    yield "    if [[ -s $log.lost ]]; then"
    yield '      last=$(tail -n 1 "$log.lost")'
    yield '      if ((newest > ${last##* })); then rm "$log.lost"; fi # it went on in between'
    yield "    fi"
