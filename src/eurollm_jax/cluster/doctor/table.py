"""What the doctor prints: one line for each check, however many processes have made it, and a line that sums up."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eurollm_jax.cluster.doctor.checks import ORDER
from eurollm_jax.cluster.doctor.compare import names_of
from eurollm_jax.cluster.doctor.finding import Finding, Report, Status

WIDTH = 150  # where the output is no terminal, as under srun
LINES = 4  # for one check with one status; more are counted
STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "not checked": "dim"}
WORST: tuple[Status, ...] = ("fail", "warn", "not checked", "pass")


@dataclass(frozen=True)
class Row:
    """A finding, and the processes whose it is: none for all, or for all together."""

    finding: Finding
    who: str = ""
    processes: tuple[int, ...] = ()


def rows(reports: Sequence[Report], joint: Sequence[Finding]) -> list[Row]:
    """Equal findings of several processes as one, in the order of checks.py; what passed is one line, with what the
    first has seen."""
    made = [Row(finding) for finding in joint]
    checks = dict.fromkeys(finding.check for report in reports for finding in report.findings)
    for check in checks:
        for status in WORST:
            groups: dict[tuple[str, str], list[Report]] = {}
            for report in reports:
                for finding in report.findings:
                    if (finding.check, finding.status) == (check, status):
                        key = ("", "") if status == "pass" else (finding.seen, finding.remedy)
                        groups.setdefault(key, []).append(report)
            made += _lines(check, status, list(groups.items()), reports)
    return sorted(made, key=lambda row: ORDER.index(row.finding.check) if row.finding.check in ORDER else len(ORDER))


def _lines(
    check: str, status: Status, groups: Sequence[tuple[tuple[str, str], list[Report]]], reports: Sequence[Report]
) -> list[Row]:
    lines = []
    for (seen, remedy), of in groups[:LINES]:
        if status == "pass":
            seen = next(f.seen for f in of[0].findings if (f.check, f.status) == (check, status))
        everywhere = len({report.process for report in of}) == len(reports)
        who = "" if everywhere else names_of(of)
        processes = () if everywhere else tuple(report.process for report in of)
        lines.append(Row(Finding(check, status, seen, remedy), who, processes))
    if len(groups) > LINES:
        rest = [report for _, of in groups[LINES:] for report in of]
        seen = "otherwise, each in its own way (--json has them)"
        lines.append(Row(Finding(check, status, seen), names_of(rest), tuple(report.process for report in rest)))
    return lines


def show(made: Sequence[Row], title: str) -> None:
    """The table, and below it the summary."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(title=title, title_justify="left", show_lines=False)
    for name, most in (("", 11), ("check", 22), ("seen", None), ("remedy", None)):
        table.add_column(name, max_width=most, overflow="fold", ratio=None if most else 1)
    for row in made:
        finding = row.finding
        seen = f"{row.who}: {finding.seen}" if row.who else finding.seen
        style = STYLES[finding.status]
        table.add_row(Text(finding.status, style), Text(finding.check), Text(seen), Text(finding.remedy))
    console.print(table)
    console.print(Text(summary(made)), soft_wrap=True)


def summary(made: Sequence[Row]) -> str:
    count = {status: sum(row.finding.status == status for row in made) for status in WORST}
    failing = dict.fromkeys(row.finding.check for row in made if row.finding.status == "fail")
    verdict = f"failed: {', '.join(failing)}" if failing else "ready to train"
    counts = f"{count['pass']} passed, {count['warn']} warnings, {count['fail']} failed"
    return f"doctor: {verdict} ({counts}, {count['not checked']} not checked)"


def status_of(made: Sequence[Row]) -> int:
    """The exit status: 1 where anything failed."""
    return int(any(row.finding.status == "fail" for row in made))
