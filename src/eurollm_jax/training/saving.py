"""Which checkpoints a run writes, and which of them it keeps."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from eurollm_jax.errors import UserError

type Kind = Literal["permanent", "before decay", "temporary"]
KINDS: tuple[str, ...] = get_args(Kind.__value__)


@dataclass(frozen=True)
class Saving:
    """What is saved beside the permanent checkpoints, and how long each is kept.

    A temporary one, by the clock or at a signal, goes as soon as a newer one of any kind is there. A permanent one goes
    where none of `last`, `every`, `best` and `before_decay` keeps it. The newest of all always stays.
    """

    last: int = 2  # newest permanent ones
    every: int | None = None  # steps; permanent ones at multiples of it are kept for ever
    best: int = 0  # permanent ones with the lowest held-out score, where they were evaluated
    before_decay: bool = True  # the one at which the schedule's decay begins, kept for ever
    minutes: float | None = 15.0  # of wall time, after which a temporary one is written
    asynchronous: bool = True  # files are written while training goes on
    failures: int = 3  # in a row to save, such as for want of room, that end the run

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("best", 0), ("failures", 1)):
            if getattr(self, name) < least:
                raise UserError(f"saving: {name}={getattr(self, name)} must be {least} or more.")
        if self.every is not None and self.every < 1:
            raise UserError(f"saving: every={self.every} must be 1 or more; every=None keeps none for ever.")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"saving: minutes={self.minutes} must be above 0; minutes=None does not save by the clock.")


@dataclass(frozen=True)
class Saved:
    """A checkpoint as the rule sees it."""

    step: int
    kind: Kind = "permanent"
    score: float | None = None  # bits per byte of held-out text at that step, the lower the better


def kept(saved: Collection[Saved], rule: Saving) -> set[int]:
    """The steps of those that stay."""
    permanent = sorted((found for found in saved if found.kind != "temporary"), key=lambda found: found.step)
    scored = [found for found in permanent if found.score is not None and math.isfinite(found.score)]
    best = sorted(scored, key=lambda found: (found.score, found.step))[: rule.best]
    for_ever = [
        found
        for found in permanent
        if (rule.every is not None and found.step % rule.every == 0)
        or (rule.before_decay and found.kind == "before decay")
    ]
    newest = sorted(saved, key=lambda found: found.step)[-1:]
    return {found.step for found in (*newest, *permanent[-rule.last :], *best, *for_ever)}
