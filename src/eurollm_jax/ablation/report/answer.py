"""The head of a study's report: what was asked, the answer in a sentence, and the figures that it rests on."""

import math

from eurollm_jax.ablation.report.records import Findings, StudyFolder
from eurollm_jax.ablation.report.words import (
    DASH,
    confidence,
    figure,
    paired_range,
    per_cent,
    power_of_ten,
    sentence,
    signed,
    signed_range,
)
from eurollm_jax.evaluation.report.frame import section
from eurollm_jax.evaluation.report.text import SPACE, count, duration, escape, paragraphs

ANCHORS = {
    "proposal": "Proposal",
    "prediction": "Prediction",
    "confirmation": "Confirmation",
    "languages": "Languages",
    "transfer": "Transfer",
    "baselines": "Baselines",
    "design": "Design",
    "cost": "Cost",
    "mixture": "To copy",
    "caveats": "Caveats",
}
MOVES = 3  # largest changes of a share that the answer names


def headline(study: StudyFolder) -> str:
    """Name, question (the docstring's first paragraph), answer, key figures and links."""
    text = ""
    for i, (kind, words) in enumerate(paragraphs(study.study.question)):
        lead = ' class="lead"' if i == 0 and kind == "p" else ""
        text += f"<{kind}{lead}>{escape(words)}</{kind}>"
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in ANCHORS.items())
    css, verdict = verdict_of(study)
    return (
        f'<header><p class="eyebrow">Report of a study of mixtures</p><h1>{escape(study.study.name)}</h1>{text}'
        f'<div class="answer {css}"><p><strong>{escape(verdict)}</strong> {sentence(answer(study))}</p></div>'
        f'<dl class="tiles">{_tiles(study)}</dl><nav>{links}</nav></header>'
    )


def verdict_of(study: StudyFolder) -> tuple[str, str]:
    """How the verdict is to look (a class of CSS), and the verdict."""
    findings, confirmation = study.findings, study.confirmation
    if findings is None:
        return "open", "Not answered yet."
    if not findings.recommended:
        if confirmation is not None and confirmation.held == "yes":
            return "open", "Not recommended by the proxies, though the proposal won when trained again."
        return "declined", "No recommendation: keep the prior."
    if confirmation is None:
        return "recommended", "Recommended: take the proposed mixture."
    return {
        "yes": ("recommended", "Recommended, and confirmed: take the proposed mixture."),
        "no": ("declined", "Not confirmed: keep the prior."),
    }.get(confirmation.held, ("open", "Recommended, but not decided by the confirmation."))


def answer(study: StudyFolder) -> str:
    """Why, in plain words: gain, moves, reasons, confirmation."""
    findings = study.findings
    ended, planned = study.ended, len(study.study.arms)
    if findings is None and ended < planned:
        return f"{ended} of {planned} proxies have ended; the law is fitted when all have."
    if findings is None:
        return f"All {planned} proxies have ended; `eurollm ablate` goes on and fits the law."
    said = list(findings.reasons)
    if study.proxies is not None and ended < planned:
        said.insert(0, f"{ended} of {planned} proxies have ended; what follows is of {findings.runs} of them.")
    if findings.recommended and (moves := _moves(study, findings)):
        said.append(f"The largest moves: {moves}.")
    if findings.further and not findings.recommended:
        said.append(findings.further)
    if study.confirmation is not None:
        said.append(study.confirmation.sentence)
    return " ".join(said)


def _moves(study: StudyFolder, findings: Findings) -> str:
    prior = {group: record.prior for group, record in study.study.groups.items()}
    change = {group: found.value - prior[group] for group, found in findings.proposal.items()}
    largest = sorted((group for group in change if abs(change[group]) >= 0.0005), key=lambda group: -abs(change[group]))
    return "; ".join(
        f"{group} from {per_cent(prior[group])} to {per_cent(findings.proposal[group].value)} of the tokens"
        for group in largest[:MOVES]
    )


def _tile(name: str, words: str, under: str) -> str:
    shown = f'<dd class="figure">{words}</dd><dd class="under">{escape(under)}</dd>'
    return f'<div class="tile"><dt>{name}</dt>{shown}</div>'


def _tiles(study: StudyFolder) -> str:
    return _gain_tile(study) + _rho_tile(study) + _confirmation_tile(study) + _run_tiles(study)


def _gain_tile(study: StudyFolder) -> str:
    name, findings = "Predicted gain", study.findings
    if findings is None:
        return _tile(name, DASH, "no law is fitted yet")
    weighing = {"uniform": "all languages alike", "official": "the official languages alike"}
    how = weighing.get(study.study.target, "languages weighted as the study says")
    under = f"{confidence(study)} interval {signed_range(findings.gain)}; {how}"
    return _tile(name, f"{signed(findings.gain.value)} <small>bits per byte</small>", under)


def _rho_tile(study: StudyFolder) -> str:
    name, findings = "Order of runs left out", study.findings
    if findings is None:
        return _tile(name, DASH, "no law is fitted yet")
    score = findings.scores.get(findings.law)
    rho, r2 = (score.rho_heldout, score.r2_heldout) if score else (None, None)
    needed = study.declared("analysis", "min_rho")
    bound = f"; a recommendation needs {needed:g}" if isinstance(needed, int | float) else ""
    return _tile(name, f"{figure(rho, 2)} <small>Spearman’s ρ</small>", f"R² {figure(r2, 2)}{bound}")


def _confirmation_tile(study: StudyFolder) -> str:
    name, found = "Confirmed gain", study.confirmation
    if found is None:
        planned = study.study.cost.confirmation is not None
        return _tile(name, DASH, "not trained yet" if planned else "the study declares no confirmation")
    gain, between = found.gain.interval, f"{100 * found.confidence:g}{SPACE}% interval {paired_range(found)}"
    under = paired_range(found) if found.pairs == 1 else f"{found.pairs} pairs of seeds; {between}"
    return _tile(name, f"{signed(gain.value)} <small>bits per byte</small>", under)


def _run_tiles(study: StudyFolder) -> str:
    cost, arms = study.study.cost, study.study.arms
    ended, bad = len(study.objectives), len(study.diverged)
    tokens = cost.proxies.tokens / max(1, cost.proxies.runs)
    runs = f"{count(cost.proxies.parameters)} parameters, {count(tokens)} tokens each"
    left_out = f"; {bad} diverged and left out" if bad else ""
    flops = cost.proxies.flops + (cost.confirmation.flops if cost.confirmation else 0.0)
    taken = [part.seconds for part in (cost.proxies, cost.confirmation) if part and part.seconds is not None]
    how = f"on {cost.devices}, of starts that ended in order"
    when = f"{duration(math.fsum(taken))} {how}" if taken else f"time not measured on {cost.devices}"
    return (
        _tile("Proxies", f"{ended} <small>of {len(arms)}</small>", f"{runs}{left_out}")
        + _tile("Groups", str(len(study.study.groups)), f"{len(study.weights)} held-out languages")
        + _tile("Cost", f"{power_of_ten(flops)} <small>FLOP</small>", when)
    )


def caveats(study: StudyFolder) -> str:
    """What such a study cannot tell, with its own figures."""
    cost = study.study.cost
    tokens = cost.proxies.tokens / max(1, cost.proxies.runs)
    larger = study.confirmation is not None
    said = [
        f"The proxies have {count(cost.proxies.parameters)} parameters and read {count(tokens)} tokens each. Which "
        "mixture "
        "is best can change with size and with how often text is repeated; "
        + (
            "the confirmation looks one step further, and no more."
            if larger
            else "nothing here was trained at another size."
        ),
        "Bits per byte on held-out text is not a score on tasks, and held-out text is of the same kinds as the "
        "store’s. "
        "They are never to be compared between languages.",
        "Only the groups’ shares were moved. Within a group the sources keep the prior’s proportions, so nothing is "
        "said "
        "of those.",
        "Intervals are for one figure each, from fits to the same runs with their noise drawn anew: of many figures "
        "some lie outside theirs, and an error of the law’s form is not in them. Outside the shares that were tried "
        "the law guesses.",
        "A cell of the transfer matrix says what a group’s tokens did to a language here, through a shared tokenizer "
        "and this "
        "store’s text. It is no statement about the languages themselves.",
    ]
    said += study.findings.caveats if study.findings else []
    if study.diverged:
        said.append(
            f"{len(study.diverged)} of {len(study.study.arms)} proxies diverged and are in no fit. If that depends "
            "on the "
            "mixture, the law has not seen the mixtures where it does."
        )
    return section("caveats", "What this cannot tell", *(f"<p>{sentence(words)}</p>" for words in said))


def footer(study: StudyFolder) -> str:
    version = study.study.versions.get("eurollm_jax", "")
    folder = f"<code>{escape(study.path.resolve().name)}</code>"
    return (
        f"<footer>Made by eurollm_jax {escape(version)} from the study’s folder {folder}, fingerprint "
        f"<code>{escape(study.study.fingerprint[:16])}</code>. One file that asks nothing of the network.</footer>"
    )
