"""Training, corpora and studies as jobs of a site's scheduler."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of
from eurollm_jax.errors import UserError

if TYPE_CHECKING:
    from eurollm_jax.cluster.launch.job import Job
    from eurollm_jax.cluster.site import Site
    from eurollm_jax.experiment import Experiment
    from eurollm_jax.training.inputs import Inputs

ABOUT = """\
eurollm launch [train] EXPERIMENT --site S --nodes N [--field value ...]
eurollm launch study STUDY --site S
eurollm launch corpus --site S --tasks N --partition P -- INPUT ... --tokenizer T --out STORE

The same command again goes on where the job before has ended."""


def add(commands: Subcommands) -> None:
    launch = command(commands, "launch", _launch, "submit training, a study or the preparation of a corpus to a site")
    launch.formatter_class = argparse.RawDescriptionHelpFormatter
    launch.usage = "eurollm launch [options] EXPERIMENT | train EXPERIMENT | study STUDY | corpus"
    launch.description = ABOUT
    _with_options(launch)
    launch.add_argument("what", help="an experiment's file; or train, study or corpus, with --help for what they take")
    launch.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options, and fields of the experiment")


def _with_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--site", help="where: a name of docs/sites.md, or a .toml file of your own")
    parser.add_argument("--nodes", type=int, help="of a training run (default: 1)")
    parser.add_argument("--time", metavar="HH:MM:SS", help="of each job (default: the most that the site gives)")
    parser.add_argument("--account", default=os.environ.get("SBATCH_ACCOUNT"), help="the project that pays")
    parser.add_argument("--partition", help="(default: the site's)")
    parser.add_argument("--qos", help="(default: the site's)")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image (default: this Python)")
    parser.add_argument("--job-name", help="(default: the name of what is made)")
    parser.add_argument("--restarts", type=int, default=100, help="that a job may ask for by itself (default: 100)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another one, as --sbatch=--exclude=node17"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the scripts; write and submit nothing")
    parser.add_argument("--follow", action="store_true", help="print the log until the job has ended, and end like it")
    return parser


def _launch(arguments: argparse.Namespace) -> int:
    kinds = {"train": _train, "study": _study, "corpus": _corpus}
    kind = arguments.what if arguments.what in kinds else "train"
    rest = arguments.rest if arguments.what in kinds else [arguments.what, *arguments.rest]
    prog = f"eurollm launch {kind}" if arguments.what in kinds else "eurollm launch"
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    _with_options(parser)
    given = vars(_with_options(argparse.ArgumentParser()).parse_args([]))
    parser.set_defaults(**{name: getattr(arguments, name) for name in given})
    return kinds[kind](parser, rest)


def _train(parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    parser.add_argument("--accept-changes", action="store_true", help="as of `eurollm train`")
    parser.add_argument("experiment", type=Path, help="a Python file")
    parser.add_argument("fields", nargs=argparse.REMAINDER, metavar="--field value", help="what to change in it")
    first = parser.parse_args(rest)
    options = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    _with_options(options)
    options.add_argument("--accept-changes", action="store_true")
    options.set_defaults(**{name: value for name, value in vars(first).items() if name not in ("experiment", "fields")})
    after, fields = options.parse_known_args(first.fields)
    named = argparse.Namespace(parser=parser, experiment=first.experiment, fields=fields)
    if {"-h", "--help"} & set(fields):
        experiment_of(named)  # prints the fields, and ends
    site = _site(parser, after)
    experiment, _ = experiment_of(named)
    arguments = (str(first.experiment), *fields)
    _require_scheduler(site, ("train", *arguments))
    nodes = 1 if after.nodes is None else after.nodes
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: take 1 or more.")
    _require_fitting(experiment, nodes * site.devices_per_node)

    from eurollm_jax.cluster.launch.submit import launch

    folder = experiment.run
    each = site.devices_per_node // site.processes_per_node
    counts = ((nodes, "node"), (site.processes_per_node, "process"), (each, "device"))
    shape = " x ".join(_counted(count, noun) for count, noun in counts)
    title = f"Trains {experiment.name}: {shape}, {_progress(experiment)}."
    job = _job(site, after, folder, experiment.name, title)
    job = _mounting(site, job, [folder.parent, first.experiment, *_paths_of(experiment)])
    job = replace(
        job,
        command=("train", "--accept-changes") if after.accept_changes else ("train",),
        arguments=arguments,
        nodes=nodes,
        checkpoints=folder.resolve() / "checkpoints",
        tasks_per_node=site.processes_per_node,
        cores=_cores(site, site.processes_per_node),
    )
    if _is_complete(experiment) and not after.dry_run:
        print(f"{folder} is complete: all {experiment.steps} steps are trained and evaluated; nothing is submitted")
        return 0
    return launch(site, [job], dry_run=after.dry_run, follow=after.follow)


def _study(parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    parser.add_argument("--name", help="of the study and its folder, in place of the one in the file")
    parser.add_argument("--tasks", type=int, help="jobs that share the ensembles of proxies (default: one for each)")
    parser.add_argument("study", type=Path, help="a Python file that defines STUDY")
    options = parser.parse_args(rest)
    site = _site(parser, options)
    _require_a_node_each(options)

    from eurollm_jax.ablation.prepared import ensembles, prepare
    from eurollm_jax.ablation.study_file import load_study
    from eurollm_jax.cluster.launch.submit import launch

    study, _ = load_study(options.study)
    study = study if options.name is None else replace(study, name=options.name)
    name = () if options.name is None else ("--name", options.name)
    arguments = (*name, str(options.study))
    _require_scheduler(site, ("ablate", *arguments))
    parts = len(ensembles(prepare(study).arms, study.at_once, site.devices_per_node))
    tasks = parts if options.tasks is None else options.tasks
    if not 1 <= tasks <= parts:
        raise UserError(f"--tasks {tasks}: study {study.name!r} has {parts} ensembles on a node: take 1 to {parts}.")
    job = _job(site, options, study.folder, study.name, "")
    job = replace(job, command=("ablate",), arguments=arguments, cores=_cores(site, 1))
    trained = [study.proxy, *([study.confirmation.experiment] if study.confirmation is not None else [])]
    read = [path for experiment in trained for path in _paths_of(experiment)]
    job = _mounting(site, job, [study.folder.parent, options.study, *read])
    jobs = [
        replace(
            job,
            title=f"Trains study {study.name}'s proxies: {_counted(parts, 'ensemble')} in {_counted(tasks, 'job')}.",
            name=f"{job.name}-proxies",
            file="proxies.sbatch",
            own=f'--ensembles "$SLURM_ARRAY_TASK_ID/{tasks}"',
            array=tasks,
        ),
        replace(
            job,
            title=f"Analyses study {study.name}, and confirms what it proposes.",
            name=f"{job.name}-analysis",
            file="analysis.sbatch",
            fits_on_cpu=True,
        ),
    ]
    return launch(site, jobs, dry_run=options.dry_run, follow=options.follow)


def _corpus(parser: argparse.ArgumentParser, rest: Sequence[str]) -> int:
    parser.usage = "eurollm launch corpus [options] --tasks N -- INPUT ... --tokenizer T --out STORE ..."
    parser.add_argument("--tasks", type=int, help="jobs that share the work")
    parser.add_argument("--cores", type=int, default=16, help="of each job (default: 16)")
    cut = rest.index("--") if "--" in rest else len(rest)
    options = parser.parse_args(rest[:cut])
    arguments = tuple(rest[cut + 1 :])
    site = _site(parser, options)
    if options.tasks is None or not arguments:
        parser.error("give --tasks N, and after -- what `eurollm corpus prepare` takes")
    _require_a_node_each(options)
    prepare = _preparation(arguments)
    _require_scheduler(site, ("corpus", "prepare", *arguments))
    if options.tasks < 1 or options.cores < 1:
        raise UserError(f"--tasks {options.tasks} --cores {options.cores}: take 1 or more.")
    if not prepare.tokenizer.exists():
        raise UserError(f"--tokenizer {prepare.tokenizer} does not exist: give its folder or its model file.")

    from eurollm_jax.cluster.launch.submit import launch

    job = _job(site, options, prepare.out, prepare.out.name, "", on_devices=False)
    job = replace(job, ends_in_time=False, cores=options.cores)
    blocklist = () if prepare.blocklist is None else (prepare.blocklist,)
    job = _mounting(site, job, [prepare.out.parent, *map(Path, prepare.inputs), prepare.tokenizer, *blocklist])
    jobs = [
        replace(
            job,
            title=f"Prepares {prepare.out} in {_counted(options.tasks, 'job')}.",
            name=f"{job.name}-prepare",
            file="prepare.sbatch",
            command=("corpus", "prepare"),
            own=f'--task "$SLURM_ARRAY_TASK_ID" --of {options.tasks}',
            arguments=arguments,
            array=options.tasks,
            piecemeal=True,
        ),
        replace(
            job,
            title=f"Checks what the jobs before have prepared, and seals {prepare.out}.",
            name=f"{job.name}-finalize",
            file="finalize.sbatch",
            command=("corpus", "finalize"),
            arguments=(str(prepare.out),),
        ),
    ]
    return launch(site, jobs, dry_run=options.dry_run, follow=options.follow)


def _preparation(arguments: Sequence[str]) -> argparse.Namespace:
    """What `eurollm corpus prepare` makes of its arguments; it ends this process with a line where it refuses them."""
    from eurollm_jax.cli import corpus

    parser = argparse.ArgumentParser(prog="eurollm")
    corpus.add(parser.add_subparsers())
    found = parser.parse_args(["corpus", "prepare", *arguments])
    if found.task is not None or found.of is not None:
        raise UserError("--task and --of are given to each job by itself: leave them out.")
    return found


def _site(parser: argparse.ArgumentParser, options: argparse.Namespace) -> "Site":
    if options.site is None:
        parser.error("give --site NAME, such as --site lumi (docs/sites.md lists them)")
    from eurollm_jax.cluster.site_files import site_of

    return site_of(options.site)


def _require_scheduler(site: "Site", words: Sequence[str]) -> None:
    if site.scheduler == "none":
        raise UserError(f"{site.name} has no scheduler: run it here: eurollm {shlex.join(words)}")


def _require_a_node_each(options: argparse.Namespace) -> None:
    if options.nodes is not None:
        raise UserError(
            f"--nodes {options.nodes} is of a training run: each job here has one node; --tasks shares them."
        )


def _job(
    site: "Site", options: argparse.Namespace, made: Path, name: str, title: str, *, on_devices: bool = True
) -> "Job":
    """What all jobs have of the options; the scripts lie beside what is made."""
    from eurollm_jax.cluster.launch.job import LEAST_SECONDS, Job, in_its_queue, seconds_of

    if options.restarts < 0:
        raise UserError(f"--restarts {options.restarts}: take 0 or more.")
    if options.container is not None and "://" not in options.container and not Path(options.container).exists():
        raise UserError(f"--container {options.container} does not exist: give the path of an image (docs/sites.md).")
    made = made.resolve()
    job = Job(
        title=title,
        name=options.job_name or name,
        folder=made.with_name(f"{made.name}.launch"),
        directory=Path.cwd(),
        python=sys.executable,
        command=(),
        arguments=(),
        seconds=LEAST_SECONDS,
        on_devices=on_devices,
        account=options.account,
        partition=options.partition,
        qos=options.qos,
        options=tuple(options.sbatch),
        image=options.container,
        restarts=options.restarts,
        python_path=_python_path(),
    )
    if options.time is not None:
        return replace(job, seconds=seconds_of(options.time))
    if site.time_limit is None:
        raise UserError(f"--time HH:MM:SS: how long may a job take? {site.name} is not known to have a limit.")
    if not in_its_queue(site, job):
        named = (f"partition {site.partition or '(default)'}", *((f"QOS {site.qos}",) if site.qos else ()))
        raise UserError(f"name --time: {site.name}'s limit of {site.time_limit} is that of {' and '.join(named)}.")
    return replace(job, seconds=seconds_of(site.time_limit))


def _python_path() -> str | None:
    """PYTHONPATH of this process, whose parts may be relative to a folder that the job is not in."""
    given = os.environ.get("PYTHONPATH")
    return given and os.pathsep.join(os.path.abspath(part) for part in given.split(os.pathsep))


def _mounting(site: "Site", job: "Job", paths: Sequence[Path]) -> "Job":
    """With what its image must see of these paths: what it reads, and the folder that what it makes is in."""
    from eurollm_jax.cluster.launch.mounts import to_mount

    if job.image is None:
        return job
    return replace(job, mounts=to_mount(site, job.directory, job.account, paths))


def _paths_of(experiment: "Experiment") -> list[Path]:
    """What a run reads; a branch, the run of its checkpoint."""
    paths = [Path(path) for path in (experiment.tokenizer, experiment.heldout, *experiment.data.stores)]
    if experiment.start_from is not None:
        paths.append(Path(experiment.start_from))
    if experiment.branch_from is not None:
        paths.append(Path(experiment.branch_from).parent.parent)
    return paths


def _cores(site: "Site", tasks: int) -> int | None:
    return None if site.cores_per_node is None else site.cores_per_node // tasks


def _require_fitting(experiment: "Experiment", devices: int) -> None:
    """UserError where mesh or batches do not fit so many devices, and for what `train` would refuse of the inputs."""
    from eurollm_jax.data.plan import mixture_plan
    from eurollm_jax.parallel.mesh import Layout
    from eurollm_jax.training.inputs import open_inputs

    places: Any = range(devices)  # the devices themselves are not needed to divide by their number
    layout = Layout(experiment.mesh.build(places))
    sizes = experiment.batch_sizes.until(experiment.total_rows).sizes
    layout.require_batches(sizes, experiment.data.sequence_length)
    for field, path in (
        ("tokenizer", experiment.tokenizer),
        ("heldout", experiment.heldout),
        *(("data.store", store) for store in experiment.data.stores),
    ):
        if not Path(path).exists():
            raise UserError(f"experiment {experiment.name!r}: {field}={path} does not exist here: mend the path.")
    inputs = open_inputs(experiment)
    experiment.schedule.build(experiment.steps)
    mixture_plan(experiment.data.mixture, inputs.data.sizes, experiment.total_rows)
    if experiment.start_from is not None or experiment.branch_from is not None:
        _require_start(experiment, inputs)


def _require_start(experiment: "Experiment", inputs: "Inputs") -> None:
    """UserError for what `train` would refuse of the checkpoint that a run begins with, read as it reads it."""
    import jax

    from eurollm_jax.training.start import hash_of_start, require_branch

    jax.config.update("jax_platforms", "cpu")  # learning rates are compared: a login node's GPU is left to others
    hashes = {
        "tokenizer": inputs.tokenizer.sha256,
        "store": inputs.data.fingerprint,
        "heldout": inputs.heldout.store.fingerprint,
        **hash_of_start(experiment),
    }
    require_branch(experiment, hashes)


def _counted(count: int, noun: str) -> str:
    several = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else several}"


def _newest(experiment: "Experiment") -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    found = (experiment.run / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=0)


def _progress(experiment: "Experiment") -> str:
    newest = _newest(experiment)
    return f"from step {newest} of {experiment.steps}" if newest else f"{experiment.steps} steps"


def _is_complete(experiment: "Experiment") -> bool:
    return _newest(experiment) == experiment.steps and (experiment.run / "evaluation.json").is_file()
