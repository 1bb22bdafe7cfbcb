"""What the sections of a study's report share: how figures and intervals are written, and what makes a missing file."""

import math
import re

from eurollm_jax.ablation.report.records import ConfirmationRecord, Interval, StudyFolder
from eurollm_jax.evaluation.report.frame import language_name
from eurollm_jax.evaluation.report.text import SPACE, escape
from eurollm_jax.languages import LANGUAGES

DASH = "–"


def missing(study: StudyFolder, what: str, file: str) -> str:
    """`what` is HTML."""
    name = escape(study.path.resolve().name)
    return (
        f'<p class="missing">{what} <code>{escape(file)}</code> is made by <code>eurollm ablate</code> with the file '
        "of "
        f"the study <code>{name}</code>, which goes on where it stopped.</p>"
    )


def signed(value: float | None, digits: int = 4) -> str:
    """A change, with a true minus."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def figure(value: float | None, digits: int = 4) -> str:
    """A number, with a true minus."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed_range(found: Interval, digits: int = 4) -> str:
    return f"{signed(found.low, digits)} to {signed(found.high, digits)}" if found.known else "not known"


def paired_range(found: ConfirmationRecord) -> str:
    """Of the gain, over the pairs of seeds."""
    gain = found.gain.interval
    return "one pair has no interval" if found.pairs == 1 and not gain.known else signed_range(gain)


def tick(value: float) -> str:
    """The end of a grid line, with a true minus."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def power_of_ten(value: float) -> str:
    """HTML of a large number: 1.25 × 10¹⁴."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits}{SPACE}×{SPACE}10<sup>{int(exponent)}</sup>"


def per_cent(value: float, digits: int = 1) -> str:
    """Shares side by side: always as many decimals."""
    return f"{100 * value:.{digits}f}{SPACE}%" if math.isfinite(value) else DASH


def share_range(found: Interval) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}{SPACE}%" if found.known else "not known"  # type: ignore[operator]


def confidence(study: StudyFolder) -> str:
    """ "90 %"."""
    return f"{100 * study.findings.confidence:g}{SPACE}%" if study.findings else ""


def sentence(words: str) -> str:
    """HTML of a sentence from a file, its numbers set as they are elsewhere on the page: −0.0037, 90 %."""
    with_minus = re.sub(r"(?<![\w.-])-(?=\d)", "\N{MINUS SIGN}", words)
    return escape(re.sub(r"(?<=\d)%", f"{SPACE}%", with_minus))


def name_cell(name: str, code: str = "") -> str:
    small = f'<span class="code">{escape(code)}</span>' if code else ""
    return f'<th scope="row" data-value="{escape(name)}">{escape(name)}{small}</th>'


def number_cell(value: float | None, words: str, css: str = "") -> str:
    """A cell that sorts by its value; one that is not known sorts last."""
    sortable = math.inf if value is None or not math.isfinite(value) else value
    return f'<td{f' class="{css}"' if css else ""} data-value="{sortable}">{words}</td>'


def counted(study: StudyFolder) -> list[str]:
    """Held-out languages by name, those with a weight first."""
    return sorted(study.weights, key=lambda code: (not study.weights[code], language_name(code)))


def family(code: str) -> str:
    return LANGUAGES[code].family if code in LANGUAGES else ""
