"""Groups: family -> language -> source. Which sources of a store a name stands for, and what a source is worth in the
unit that a mixture is written in."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from eurollm_jax.data.recipe import Level, Unit
from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES, resolve


@dataclass(frozen=True, slots=True)
class SourceSize:
    """One epoch of a source: its tokens, its raw UTF-8 bytes, the rows that its tokens fill, and its language's code
    (\"\" where it has none)."""

    tokens: int
    bytes: int
    rows: int
    language: str = ""


@dataclass(frozen=True)
class Corpus:
    """The sizes of a store's sources by name, and byte premiums by language code that go before the table's."""

    sizes: Mapping[str, SourceSize]
    premiums: Mapping[str, float] = field(default_factory=dict)

    def amount(self, name: str, unit: Unit) -> float:
        """One epoch of the source, in the unit. Content is bytes over the language's byte premium: the bytes that the
        same text would have in English. Raises UserError for a language without a premium."""
        size = self.sizes[name]
        if unit == "tokens":
            return size.tokens
        if unit == "bytes":
            return size.bytes
        premium = self.premiums.get(size.language)
        if premium is None:
            premium = LANGUAGES[self.group(name, "language")].byte_premium
        if premium is None:
            raise UserError(
                f"mixture: unit='content' needs the byte premium of {size.language!r} ({name}), which was not "
                f"measured; give one, for example .content_premiums({{{size.language!r}: 1.0}})"
            )
        return size.bytes / premium

    def per_row(self, name: str, unit: Unit) -> float:
        """What a row of the source holds of the unit, on average."""
        return self.amount(name, unit) / self.sizes[name].rows

    def group(self, name: str, level: Level) -> str:
        """The source's group at that level. Raises UserError for a source whose language is not in the table."""
        if level == "source":
            return name
        language = LANGUAGES.get(self.sizes[name].language)
        if language is None:
            raise UserError(
                f"mixture: the source {name!r} has the language {self.sizes[name].language!r}, which is not in the "
                f"language table, so it belongs to no language and no family; add .without({name!r}), or write the "
                "mixture over sources in tokens or bytes"
            )
        return language.code if level == "language" else language.family

    def grouped(self, names: Iterable[str], level: Level) -> dict[str, list[str]]:
        """The sources by their group at that level."""
        groups: dict[str, list[str]] = {}
        for name in sorted(names):
            groups.setdefault(self.group(name, level), []).append(name)
        return groups

    def members(self, name: str, level: Level | None = None) -> frozenset[str]:
        """The sources that `name` stands for: itself, a language's or a family's; `level` allows one of these alone.

        `source:fi`, `language:fi` and `family:Uralic` say which is meant. Raises UserError for a name that the store
        lacks, and for one that is both a source and a language with further sources.
        """
        prefix, _, rest = name.partition(":")
        if name not in self.sizes and level is None and prefix in get_args(Level):
            return self.members(rest, next(known for known in get_args(Level) if known == prefix))
        found = {kind: self._members_at(name, kind) for kind in get_args(Level) if level in (None, kind)}
        found = {kind: names for kind, names in found.items() if names}
        if not found:
            raise UserError(
                f"the mixture names the {level or 'source'} {name!r}, which the store lacks; {self._hint(name, level)}"
            )
        if len(set(found.values())) > 1:
            kinds = list(found)
            sources = ", ".join(sorted(found[kinds[1]]))
            raise UserError(
                f"the mixture names {name!r}, which is a {kinds[0]} and also the {kinds[1]} of {sources}; write "
                f"{f'{kinds[0]}:{name}'!r} or {f'{kinds[1]}:{name}'!r}"
            )
        return next(iter(found.values()))

    def _members_at(self, name: str, level: Level) -> frozenset[str]:
        if level == "source":
            return frozenset({name} & self.sizes.keys())
        languages = {source: LANGUAGES.get(size.language) for source, size in self.sizes.items()}
        return frozenset(
            source
            for source, language in languages.items()
            if language is not None and name == (language.code if level == "language" else language.family)
        )

    def _hint(self, name: str, level: Level | None) -> str:
        known = {size.language for size in self.sizes.values()} & LANGUAGES.keys()
        families = {LANGUAGES[code].family for code in known}
        levels: dict[Level | None, Iterable[str]] = {"source": self.sizes, "language": known, "family": families}
        options = {*self.sizes, *known, *families} if level is None else set(levels[level])
        try:
            code = resolve(name).code
        except UserError:
            code = ""
        close = [code] if code in options else difflib.get_close_matches(name, sorted(options), n=1, cutoff=0.5)
        has = sorted(self.sizes if level is None else options)
        return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(has)}"


def listed(names: Iterable[str]) -> str:
    """The names with their verb: "fi is", "fi, sv are"."""
    names = list(names)
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def union(sets: Iterable[Iterable[str]]) -> set[str]:
    """All that is in any of the sets."""
    return {name for names in sets for name in names}
