"""`eurollm doctor`: is this environment what a run needs, and are all processes of a job alike?"""

import argparse
import re
import sys
from pathlib import Path

from eurollm_jax.cli.arguments import Subcommands, command
from eurollm_jax.errors import UserError

SECONDS = 120.0
DAY = 86400.0


def add(commands: Subcommands) -> None:
    doctor = command(
        commands, "doctor", _doctor, "check this environment, alone or in all processes of a job, and say what to mend"
    )
    doctor.add_argument("--site", metavar="NAME|FILE", help="compare with a site's profile (docs/sites.md)")
    doctor.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where runs are to be (default: the site's, or here)"
    )
    doctor.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help=f"that one stage, and the wait for other processes, may take (default: {SECONDS:g}); the import of jax,"
        " and devices whose start holds up the whole process, may take two stages' time and 120 seconds more",
    )
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write all findings there, too")
    doctor.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 of several listens (Slurm and Open MPI are recognised without this)",
    )
    doctor.add_argument("--processes", type=int, metavar="N", help="how many processes there are, with --coordinator")
    doctor.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")


def _doctor(arguments: argparse.Namespace) -> int:
    from eurollm_jax.cluster.doctor.examine import Question, examine, summed_up
    from eurollm_jax.cluster.doctor.table import rows, show, status_of
    from eurollm_jax.cluster.site_files import site_of
    from eurollm_jax.corpus.folders import write_json

    if not 1 <= arguments.seconds <= DAY:  # as nan is not
        raise UserError(f"--seconds {arguments.seconds:g} is none that can be waited: give 1 to {DAY:g}.")
    site = None if arguments.site is None else site_of(arguments.site)
    question = Question(site, arguments.site, arguments.scratch, arguments.seconds, _by_hand(arguments))
    found = examine(question)
    process, processes = question.place
    if process and found.told:
        return int(bool(found.stopped)) or status_of(rows([found.own], []))  # process 0 prints for all
    made = rows([found.own, *found.others], found.joint)
    where = f"{processes} processes" if processes > 1 else found.own.host
    if process:
        where = f"process {process} on {found.own.host}, which process 0 does not know of"
    show(made, f"{where}{f' for {site.title}' if site else ''}")
    sys.stdout.flush()
    if arguments.json is not None and not process:
        lines = [{**vars(row.finding), "processes": list(row.processes)} for row in made]
        status = "fail" if status_of(made) else "pass"
        write_json(arguments.json, {"status": status, "processes": processes, "rows": lines, **summed_up(found)})
    return status_of(made)


def _by_hand(arguments: argparse.Namespace) -> tuple[str, int, int] | None:
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if given == (None, None, None):
        return None
    if None in given:
        raise UserError("--coordinator, --processes and --process belong together: give all three or none.")
    address, processes, process = given
    if not 0 <= process < processes:
        raise UserError(f"process {process} of {processes} is none: give --process a number from 0 to {processes - 1}.")
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator {address} has no port: write it as host:port.")
    return address, processes, process
