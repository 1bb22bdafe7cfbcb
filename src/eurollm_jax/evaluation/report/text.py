"""Turns numbers and foreign text into words that are safe and pleasant in an HTML page."""

import html
import math
import re

SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
NOT_FINITE = "not finite"

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(text: str) -> str:
    """HTML text of any string.

    Markup is escaped; a control character becomes its visible picture (U+2400 to U+2421); what may not stand in a page
    at all (C1 controls, halves of surrogate pairs) becomes U+FFFD. Newline and tab stay.
    """

    def picture(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"

    return html.escape(_UNPRINTABLE.sub(picture, text))


def paragraphs(docstring: str) -> list[tuple[str, str]]:
    """Split a docstring at blank lines into ("p", text) and, where every line is indented, ("pre", text)."""
    blocks = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            blocks.append(("pre", "\n".join(line[4:].rstrip() for line in lines)))
        elif block.strip():
            blocks.append(("p", " ".join(line.strip() for line in lines)))
    return blocks


def _scaled(value: float, units: list[tuple[float, str]]) -> str:
    """Three digits that count, before the largest unit that fits."""
    for scale, unit in units:
        if value >= scale:
            number = value / scale
            digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
            return f"{number:.{digits}f}{SPACE}{unit}"
    return f"{value:,.0f}"


def count(value: float) -> str:
    """12345678 as "12.3 M"; below a million all digits."""
    return _scaled(value, [(1e12, "T"), (1e9, "B"), (1e6, "M")])


def size(value: float) -> str:
    """Bytes in decimal units: "47.1 kB", "31.6 MB"."""
    return (
        _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")])
        if value >= 1e3
        else f"{value:.0f}{SPACE}B"
    )


def duration(seconds: float) -> str:
    """ "48 s", "6 min 5 s", "3 h 20 min", "2 d 4 h"."""
    total = round(seconds)
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (n, _) in enumerate(parts) if n), 3)
    return " ".join(f"{n}{SPACE}{unit}" for n, unit in parts[first : first + 2] if n) or f"0{SPACE}s"


def share(value: float) -> str:
    """A share as per cent with two digits that count: "12.3 %", "0.41 %", "0.00012 %"."""
    if not math.isfinite(value):
        return NOT_FINITE
    per_cent = 100 * value
    digits = (
        1 if per_cent >= 9.95 or per_cent == 0 else 2 if per_cent >= 0.095 else 1 - math.floor(math.log10(per_cent))
    )
    return f"{per_cent:.{digits}f}{SPACE}%"


def signed_percent(value: float) -> str:
    """A change with its sign: "+21.4 %", "−3.0 %" (a true minus)."""
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{100 * value:+.1f}{SPACE}%".replace("-", "\N{MINUS SIGN}")


def bits(value: float) -> str:
    """Bits per byte with three decimals; a value that is not a number says so."""
    return f"{value:.3f}" if math.isfinite(value) else NOT_FINITE
