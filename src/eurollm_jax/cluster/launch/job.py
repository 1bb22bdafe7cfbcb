"""Job: what a script runs and asks the scheduler for, and what is refused before it waits in a queue for nothing."""

import re
from dataclasses import dataclass
from pathlib import Path

from eurollm_jax.cluster.site import Container, Site
from eurollm_jax.errors import UserError

WRITTEN = {  # options of sbatch that every script has, and what changes them
    **dict.fromkeys(("job-name", "J"), "--job-name"),
    **dict.fromkeys(("account", "A"), "--account"),
    **dict.fromkeys(("partition", "p"), "--partition"),
    **dict.fromkeys(("qos", "q"), "--qos"),
    **dict.fromkeys(("time", "t"), "--time"),
    **dict.fromkeys(("nodes", "N"), "--nodes"),
    **dict.fromkeys(("array", "a"), "--tasks"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "processes_per_node of a site file (docs/sites.md)"),
    **dict.fromkeys(("cpus-per-task", "c"), "--cores of a corpus, or cores_per_node of a site file (docs/sites.md)"),
    **dict.fromkeys(("requeue", "no-requeue"), "--restarts"),
    **dict.fromkeys(("chdir", "D"), "the folder that you launch from"),
    **dict.fromkeys(("output", "o", "open-mode"), "the experiment's runs, which the logs are beside"),
    "signal": "--time, which it counts back from",
}
LEAST_SECONDS = 120  # of a job: below that nothing is trained between its start and its end
SAVE_SECONDS = 180  # before a job's end: when Slurm tells the processes to save; docs/runs.md


@dataclass(frozen=True)
class Job:
    """One script. Words of `command` and `arguments` are given to eurollm as they are; `own` is shell text between the
    two, such as '--task "$SLURM_ARRAY_TASK_ID"'."""

    title: str  # what it does, for the head of the script
    name: str
    folder: Path  # absolute: for the script and the logs
    directory: Path  # absolute: where it runs
    python: str  # the interpreter that runs eurollm where there is no container
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    seconds: int  # that it may take
    own: str = ""
    file: str = "job.sbatch"  # the script's name in the folder
    nodes: int = 1
    tasks_per_node: int = 1
    cores: int | None = None  # of a task
    on_devices: bool = True  # else the site's partition, options and bindings are not for it
    ends_in_time: bool = True  # the command knows --time-limit
    piecemeal: bool = False  # where it is killed it has lost its last piece of work alone
    fits_on_cpu: bool = False  # and needs JAX's CPU backend beside that of the devices
    checkpoints: Path | None = None  # absolute: a folder whose newest number says how far it has come
    array: int | None = None  # how many jobs of this script there are, numbered from 0
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    options: tuple[str, ...] = ()  # further #SBATCH lines of the user
    image: str | None = None
    mounts: tuple[str, ...] = ()  # folders that the image must see beside the site's and the working directory
    python_path: str | None = None  # PYTHONPATH of the process that launches, where there is no image
    restarts: int = 100  # that it asks for itself

    @property
    def script(self) -> Path:
        return self.folder / self.file

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def save_seconds(self) -> int:
        """Before its end: when the processes are told to save. Less where the job itself is short."""
        return min(SAVE_SECONDS, self.seconds // 3)


def seconds_of(limit: str) -> int:
    """Of HH:MM:SS or D-HH:MM:SS."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})", limit)
    if not found:
        raise UserError(f"{limit!r} is no time: write it as 23:50:00 or 1-12:00:00.")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def clock(seconds: int) -> str:
    """HH:MM:SS, with more than 24 hours where there are more."""
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def container_of(site: Site) -> Container:
    """How the site runs images, or how Apptainer does on its chips."""
    flags = {"cuda": " --nv", "rocm": " --rocm"}
    return site.container or Container(f"apptainer exec{flags.get(site.chip.backend, '')}")


def in_its_queue(site: Site, job: Job) -> bool:
    """Whether the site's limits, which are those of its partition and quality of service, are the job's."""
    given = (site.partition, site.qos) if job.on_devices else (None, None)
    return (job.partition or given[0], job.qos or given[1]) == (site.partition, site.qos)


def require_fitting(site: Site, job: Job) -> None:
    """Raises UserError for what the site would refuse, or leave in its queue for good."""
    limited = in_its_queue(site, job)
    if limited and site.nodes is not None and job.nodes > site.nodes:
        raise UserError(f"--nodes {job.nodes}: a job on {site.name} may have {site.nodes}: take fewer.")
    if limited and site.time_limit is not None and job.seconds > seconds_of(site.time_limit):
        raise UserError(
            f"--time {clock(job.seconds)}: a job on {site.name} may take {site.time_limit}: take that, and the run "
            "goes on in the next job by itself."
        )
    if job.seconds < LEAST_SECONDS:
        raise UserError(f"--time {clock(job.seconds)} is too short to start in: take {clock(LEAST_SECONDS)} or more.")
    if site.account and job.account is None:
        raise UserError(f"{site.name} asks which project pays: give --account PROJECT, or set SBATCH_ACCOUNT.")
    for what, text in (
        ("--job-name", job.name),
        ("--account", job.account),
        ("--partition", job.partition),
        ("--qos", job.qos),
        ("the folder", str(job.folder)),
        ("the working directory", str(job.directory)),
        *(("--sbatch", option) for option in job.options),
    ):
        if text is not None and (not text.isprintable() or '"' in text or not text):
            raise UserError(f"{what} {text!r} cannot stand in a job script: use printable characters without quotes.")
    for option in job.options:
        if not option.startswith("-"):
            raise UserError(f"--sbatch {option!r} is no option of sbatch: write it as --sbatch=--exclude=node17.")
        name = re.split("[= ]", option.lstrip("-"), maxsplit=1)[0]
        if (own := WRITTEN.get(name if option.startswith("--") else name[:1])) is not None:
            raise UserError(f"--sbatch {option!r}: the script has that option already: it follows from {own}.")
    if job.image is not None and (found := set(str(job.directory)) & {",", ":"}):
        raise UserError(
            f"{job.directory} has a {found.pop()!r} in its name, at which containers divide what they mount: launch "
            "from another folder."
        )
