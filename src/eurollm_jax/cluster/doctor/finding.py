"""Finding: what one check has seen, and Report: what one process has found."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

type Status = Literal["pass", "warn", "fail", "not checked"]


@dataclass(frozen=True)
class Finding:
    """`seen` says what was there, and `remedy` what to do about it."""

    check: str
    status: Status
    seen: str
    remedy: str = ""


def passed(check: str, seen: str) -> Finding:
    return Finding(check, "pass", seen)


def warned(check: str, seen: str, remedy: str) -> Finding:
    return Finding(check, "warn", seen, remedy)


def failed(check: str, seen: str, remedy: str) -> Finding:
    return Finding(check, "fail", seen, remedy)


def unchecked(check: str, why: str) -> Finding:
    return Finding(check, "not checked", why)


@dataclass(frozen=True)
class Report:
    """Of one process. `facts` are the same in all processes of a sound job; `measured` are compared by their size."""

    process: int
    host: str
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        fields = json.loads(text)
        return cls(**{**fields, "findings": tuple(Finding(**finding) for finding in fields["findings"])})

    def with_(self, *findings: Finding) -> "Report":
        return Report(self.process, self.host, (*self.findings, *findings), self.facts, self.measured)


def guarded(check: str, function: Callable[[], Finding | Sequence[Finding]], remedy: str = "") -> tuple[Finding, ...]:
    """What a check finds; an exception that leaves it is a finding, too."""
    try:
        found = function()
    except Exception as error:
        return (failed(check, said_by(error), remedy or "this check could not be completed: see the message"),)
    return (found,) if isinstance(found, Finding) else tuple(found)


def said_by(error: BaseException) -> str:
    """The exception's type and its first line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
