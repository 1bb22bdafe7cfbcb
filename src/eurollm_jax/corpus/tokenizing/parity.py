"""Parity gate: refuses a mixture whose tokenizer serves a language far worse than English.

A tokenizer that does not know a script spells it out in bytes. Such a language fills rows with many tokens of little
content: it is learnt worse, costs more to generate, and takes a larger share of a mixture measured in tokens than
anybody decided. The figures are those of the running text in a store; it is not parallel text, so a premium also
says what the texts are about.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES, resolve


class Served(Protocol):
    """What the gate reads of a store's source."""

    @property
    def language(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def fallback(self) -> int: ...  # tokens that stand for one byte


@dataclass(frozen=True, slots=True)
class Parity:
    """The limits; languages in `allow` may be beyond them, which is logged and recorded."""

    max_premium: float = 2.5  # tokens for as much content, relative to English
    max_fallback: float = 0.02  # share of tokens
    allow: tuple[str, ...] = ()  # languages

    def __post_init__(self) -> None:
        if not (self.max_premium >= 1 and 0 <= self.max_fallback <= 1):
            raise UserError(
                f"parity: max_premium={self.max_premium} must be 1 or more, and max_fallback={self.max_fallback} a "
                "share from 0 to 1."
            )
        for language in self.allow:
            resolve(language)


@dataclass(frozen=True, slots=True)
class SourceParity:
    """How the tokenizer serves one source."""

    source: str
    language: str
    share: float  # of the run's rows
    fallback: float  # share of its tokens
    premium: float | None  # None where the language's byte premium is not known
    beyond: tuple[str, ...]  # the limits that it exceeds: "premium", "fallback"
    allowed: bool


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All sources with a share, the dearest first. A premium of 1 is what `reference` pays."""

    limits: Parity
    reference: str | None  # a language; None where no byte premium is known
    sources: tuple[SourceParity, ...]

    @property
    def refused(self) -> tuple[SourceParity, ...]:
        return tuple(source for source in self.sources if source.beyond and not source.allowed)

    @property
    def allowed(self) -> tuple[SourceParity, ...]:
        """Beyond the limits, and let pass."""
        return tuple(source for source in self.sources if source.beyond and source.allowed)

    def require(self) -> None:
        """UserError, with the table, for languages beyond the limits that are not allowed."""
        if not self.refused:
            return
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        named = ", ".join(dict.fromkeys(source.language for source in self.refused))
        raise UserError(
            f"the tokenizer serves {named} beyond the limits of parity: train a tokenizer with more of their text, "
            "leave them out of the mixture, or name them in Experiment(parity=Parity(allow=(...))).\n"
            + capture.get().rstrip()
        )

    def table(self) -> Table:
        """The report for the terminal."""
        reference = LANGUAGES[self.reference].name if self.reference else "nothing known"
        table = Table(
            title="How the tokenizer serves each source, dearest first",
            caption=f"premium: tokens for as much content as {reference}, by running text and byte premiums (FLORES); "
            f"limits {self.limits.max_premium:g} and {self.limits.max_fallback:.2%} fallback",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("source", no_wrap=True)
        for name in ("share", "premium", "fallback"):
            table.add_column(name, justify="right")
        table.add_column("beyond")
        for source in self.sources:
            premium = "-" if source.premium is None else f"{source.premium:.2f}"
            beyond = ", ".join(source.beyond) + (" (allowed)" if source.beyond and source.allowed else "")
            table.add_row(source.source, f"{source.share:.3%}", premium, f"{source.fallback:.2%}", beyond)
        return table

    def describe(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            **asdict(self.limits),
            "reference": self.reference,
            "sources": {source.source: asdict(source) for source in self.sources},
            "allowed_beyond": list(dict.fromkeys(source.language for source in self.allowed)),
        }


def parity_report(limits: Parity, sources: Mapping[str, Served], shares: Mapping[str, float]) -> ParityReport:
    """How the tokenizer of a store serves the sources with a share.

    Content is bytes divided by the language's byte premium. Premiums are relative to all English text of the store,
    or, if it has none, to the language with the fewest tokens for its content.
    """
    costs = _costs(sources.values())
    reference = "en" if "en" in costs else min(costs, key=lambda language: costs[language], default=None)
    allow = {resolve(language).code for language in limits.allow}
    found = []
    for name, share in shares.items():
        source = sources[name]
        if not share or not source.tokens:
            continue
        cost = _costs([source]).get(source.language)
        premium = None if cost is None or reference is None else cost / costs[reference]
        fallback = source.fallback / source.tokens
        beyond = []
        if premium is not None and premium > limits.max_premium:
            beyond.append("premium")
        if fallback > limits.max_fallback:
            beyond.append("fallback")
        found.append(
            SourceParity(name, source.language, share, fallback, premium, tuple(beyond), source.language in allow)
        )
    found.sort(key=lambda source: (-(source.premium or 0), -source.fallback, source.source))
    return ParityReport(limits, reference, tuple(found))


def _costs(sources: Iterable[Served]) -> dict[str, float]:
    """Tokens per byte of content of each language whose byte premium is known."""
    sums: dict[str, list[int]] = {}
    for source in sources:
        tokens, size = sums.setdefault(source.language, [0, 0])
        sums[source.language] = [tokens + source.tokens, size + source.bytes]
    costs = {}
    for language, (tokens, size) in sums.items():
        premium = LANGUAGES[language].byte_premium
        if premium is not None and size and tokens:
            costs[language] = tokens * premium / size
    return costs


def languages_of(sources: Sequence[SourceParity]) -> str:
    """The languages and their figures, for a line in the log."""
    return ", ".join(
        f"{source.source} (premium {'unknown' if source.premium is None else format(source.premium, '.2f')}, "
        f"fallback {source.fallback:.2%})"
        for source in sources
    )
