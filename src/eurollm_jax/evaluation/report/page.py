"""Puts the sections of the report together in one page, and prints the closing table of the quick start."""

from pathlib import Path

from rich import box, markup
from rich.table import Table

from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report import curves, summary, tables
from eurollm_jax.evaluation.report.frame import by_status, command, page, write_whole
from eurollm_jax.evaluation.report.records import read_run
from eurollm_jax.evaluation.report.text import bits, signed_percent


def write_report(run: Path) -> Path:
    """Write `run`/report.html from what the run directory holds and return its path.

    A section whose file is not there yet says so and names the command that makes it. Raises UserError where `run` is
    not a run directory or a file in it is malformed; the report that was there then stays as it was.
    """
    record = read_run(run)
    body = "\n".join(
        [
            summary.headline(record),
            "<main>",
            curves.learning(record),
            tables.languages(record),
            curves.progress(record),
            tables.mixture(record),
            curves.throughput(record),
            summary.samples(record),
            summary.provenance(record),
            "</main>",
            summary.footer(record),
        ]
    )
    return write_whole(run / "report.html", page(f"{record.experiment.name}: report of a run", body))


def final_table(run: Path) -> Table:
    """One line per language, official ones first: held-out bytes, bits per byte of the model and its baselines."""
    evaluation = read_run(run).evaluation
    if evaluation is None:
        raise UserError(f"{run} has no evaluation.json: make it with `{command(run)}`.")
    won = evaluation.beats_xz
    table = Table(
        title="Held-out bits per byte, fewer is better.\n"
        f"The model beats xz in {won.official} of {won.official_total} official languages, "
        f"{won.all} of {won.all_total} in all.",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("language", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("bytes", "model", "xz -9e", "order-0", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, group in by_status(evaluation.languages):
        for _, result in group:
            table.add_row(
                markup.escape(result.name),
                markup.escape(result.status),
                f"{result.bytes:,}",
                f"[bold]{bits(result.bits_per_byte)}[/]",
                bits(result.baselines.xz),
                bits(result.baselines.order0),
                f"[{'green' if result.gain > 0 else 'red'}]{signed_percent(result.gain)}[/]",
            )
        table.add_section()
    return table
