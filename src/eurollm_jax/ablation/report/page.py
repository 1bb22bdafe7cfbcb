"""Puts the sections of a study's report together in one page, in the frame of a run's report."""

from importlib import resources
from pathlib import Path

from eurollm_jax.ablation.report import answer, fit, languages, runs, shares
from eurollm_jax.ablation.report.records import read_study
from eurollm_jax.evaluation.report.frame import page, write_whole


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the study's folder holds and return its path.

    A section whose file is not there yet says so and what makes it. Raises UserError where `folder` is not a study's or
    a file in it is malformed; the report that was there then stays as it was.
    """
    study = read_study(folder)
    body = "\n".join(
        [
            answer.headline(study),
            "<main>",
            shares.proposal(study),
            fit.prediction(study),
            fit.confirmation(study),
            languages.languages(study),
            languages.transfer(study),
            shares.baselines(study),
            runs.design(study),
            runs.cost(study),
            runs.to_copy(study),
            answer.caveats(study),
            "</main>",
            answer.footer(study),
        ]
    )
    style = resources.files("eurollm_jax.ablation.report").joinpath("study.css").read_text(encoding="utf-8")
    return write_whole(folder / "report.html", page(f"{study.study.name}: report of a study", body, style))
