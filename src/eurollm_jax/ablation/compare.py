"""Studies side by side: what each found, how sure it is, what it cost, and whether they can be compared at all."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich import markup
from rich.table import Table

from eurollm_jax.ablation.report.answer import verdict_of
from eurollm_jax.ablation.report.records import Interval, StudyFolder, field_of, read_study
from eurollm_jax.ablation.report.terminal import plain_table
from eurollm_jax.ablation.report.words import DASH, figure, paired_range, signed, signed_range
from eurollm_jax.evaluation.report.frame import language_name
from eurollm_jax.evaluation.report.text import count, duration


def compare(folders: Sequence[Path]) -> tuple[list[Table], list[str]]:
    """Tables of the studies in `folders` (verdicts, shares, bits per byte), and in what they differ.

    A study that is not answered yet has dashes. Raises UserError as `read_study` does.
    """
    studies = [read_study(folder) for folder in folders]
    names = _names(studies)
    return [_verdicts(studies, names), _shares(studies, names), _languages(studies, names)], _differences(
        studies, names
    )


def _names(studies: Sequence[StudyFolder]) -> list[str]:
    """Their names, numbered where two share one."""
    names = [study.study.name for study in studies]
    return [name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names)]


def _table(title: str, first: str, names: Sequence[str]) -> Table:
    table = plain_table(title)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(markup.escape(name), justify="right")
    return table


def _verdicts(studies: Sequence[StudyFolder], names: Sequence[str]) -> Table:
    table = _table("What was found", "", names)
    lines = {
        "verdict": lambda s: verdict_of(s)[1],
        "predicted gain": lambda s: _gain(s.findings.gain if s.findings else None),
        "law": lambda s: s.findings.law if s.findings else DASH,
        "rho, runs left out": lambda s: figure(_rho(s), 2),
        "confirmed gain": lambda s: _confirmed(s),
        "proxies (diverged)": lambda s: f"{len(s.objectives)} of {len(s.study.arms)} ({len(s.diverged)})",
        "parameters": lambda s: count(s.study.cost.proxies.parameters),
        "tokens each": lambda s: count(_size(s)[1]),
        "FLOP": lambda s: f"{_flops(s):.3g}",
        "time, starts that ended in order": lambda s: _time(s),
    }
    for line, show in lines.items():
        table.add_row(line, *(markup.escape(show(study)) for study in studies))
    return table


def _gain(found: Interval | None) -> str:
    return DASH if found is None else f"{signed(found.value)} ({signed_range(found)})"


def _confirmed(study: StudyFolder) -> str:
    found = study.confirmation
    return DASH if found is None else f"{signed(found.gain.mean)} ({paired_range(found)})"


def _rho(study: StudyFolder) -> float | None:
    score = study.findings.scores.get(study.findings.law) if study.findings else None
    return score.rho_heldout if score else None


def _flops(study: StudyFolder) -> float:
    cost = study.study.cost
    return cost.proxies.flops + (cost.confirmation.flops if cost.confirmation else 0.0)


def _time(study: StudyFolder) -> str:
    parts = (study.study.cost.proxies, study.study.cost.confirmation)
    taken = [part.seconds for part in parts if part is not None and part.seconds is not None]
    return f"{duration(math.fsum(taken))} on {study.study.cost.devices}" if taken else DASH


def _shares(studies: Sequence[StudyFolder], names: Sequence[str]) -> Table:
    table = _table("Shares of tokens: prior → proposed", "group", names)
    for group in dict.fromkeys(group for study in studies for group in study.study.groups):
        table.add_row(markup.escape(group), *(_move(study, group) for study in studies))
    return table


def _move(study: StudyFolder, group: str) -> str:
    if group not in study.study.groups:
        return ""
    prior = study.study.groups[group].prior
    proposed = study.findings.proposal[group].value if study.findings else math.nan
    return f"{100 * prior:.1f} → {100 * proposed:.1f} %" if math.isfinite(proposed) else f"{100 * prior:.1f} → {DASH}"


def _languages(studies: Sequence[StudyFolder], names: Sequence[str]) -> Table:
    table = _table("Bits per byte: prior → proposal", "language", names)
    codes = {code for study in studies for code in study.weights}
    for code in sorted(codes, key=language_name):
        table.add_row(markup.escape(language_name(code)), *(_bits(study, code) for study in studies))
    return table


def _bits(study: StudyFolder, code: str) -> str:
    if code not in study.weights:
        return ""
    if study.findings is None:
        return DASH
    prior, proposal = (at.get(code) for at in (study.findings.predicted.prior, study.findings.predicted.proposal))
    return f"{figure(prior.value if prior else None, 3)} → {figure(proposal.value if proposal else None, 3)}"


def _differences(studies: Sequence[StudyFolder], names: Sequence[str]) -> list[str]:
    """Sentences on what keeps the figures from being compared."""
    said = []
    first, rest = studies[0], list(zip(studies[1:], names[1:], strict=True))
    for study, name in rest:
        pair = f"{names[0]} and {name}"
        mine, other = first.study.groups, study.study.groups
        if {g: set(r.sources) for g, r in mine.items()} != {g: set(r.sources) for g, r in other.items()}:
            said.append(
                f"{pair} have other groups{_only(set(mine), set(other))}: shares are not comparable one by one."
            )
        if not _close(first.weights, study.weights):
            said.append(
                f"{pair} have other targets ({first.study.target}, {study.study.target}): their gains are of other "
                "things."
            )
        hashes = [_inputs(s, "heldout") for s in (first, study)]
        if None not in hashes and hashes[0] != hashes[1]:
            said.append(f"{pair} have other held-out text: bits per byte are not comparable.")
        if _size(first) != _size(study):
            said.append(f"{pair} have proxies of another size or length: compare changes, not bits per byte.")
    return said


def _size(study: StudyFolder) -> tuple[int, int]:
    """Parameters and tokens of a proxy."""
    proxies = study.study.cost.proxies
    return proxies.parameters, proxies.tokens // max(1, proxies.runs)


def _inputs(study: StudyFolder, name: str) -> str | None:
    found = field_of(study.identity, "proxy", "inputs", name)
    return found if isinstance(found, str) else None


def _only(mine: set[str], other: set[str]) -> str:
    parts = [f"only the first has {', '.join(sorted(mine - other))}"] if mine - other else []
    parts += [f"only the second has {', '.join(sorted(other - mine))}"] if other - mine else []
    return f" ({'; '.join(parts)})" if parts else " of the same names"


def _close(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[code], b[code], abs_tol=1e-9) for code in a)
