"""Baselines: the shares of groups that the usual rules for multilingual mixtures give, to hold a proposal against."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.schedule import SHARE_SUM
from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)

UNIMAX_EPOCHS = 4.0
"""Of UniMax where the study caps no epochs: repeating text four times costs next to nothing (Muennighoff et al. 2023,
section 5)."""


def token_shares(mixture: Mixture, sizes: Mapping[str, SourceSize], total_rows: int) -> dict[str, float]:
    """Each source's share of the tokens of a run of so many rows, over all its stages. Raises as `Mixture.compile`."""
    schedule = mixture.compile(sizes, total_rows)
    stops = [stage.start for stage in schedule.stages[1:]] + [total_rows]
    tokens = dict.fromkeys(schedule.names, 0.0)
    for stage, stop in zip(schedule.stages, stops, strict=True):
        for name, share in zip(schedule.names, stage.shares, strict=True):
            tokens[name] += (stop - stage.start) * share / SHARE_SUM * sizes[name].tokens / max(sizes[name].rows, 1)
    total = sum(tokens.values())
    return {name: amount / total for name, amount in tokens.items() if amount > 0}


def group_shares(
    shares: Mapping[str, float], within: Sequence[Mapping[str, float]]
) -> tuple[Float[np.ndarray, "G"], list[str]]:
    """The groups' shares, not rescaled, and the sources that have a share and no group."""
    grouped = {name for members in within for name in members}
    summed = np.array([sum(shares.get(name, 0.0) for name in members) for members in within])
    return summed, sorted(shares.keys() - grouped)


def baseline_shares(
    within: Sequence[Mapping[str, float]], sizes: Mapping[str, SourceSize], tokens: float, max_epochs: float | None
) -> dict[str, Float[np.ndarray, "G"]]:
    """Group shares by rule, for a run of so many tokens: what each rule gives the sources of the groups, summed.

    The rules deal tokens to languages. One that cannot be applied is left out, and a line in the log says why: UniMax
    where all text is used up, or a source whose language the table lacks.
    """
    sizes = {name: sizes[name] for members in within for name in members}
    rows = max(1, round(tokens * sum(s.rows for s in sizes.values()) / sum(s.tokens for s in sizes.values())))
    rules = {
        "proportional": Mixture.proportional("tokens"),
        "temperature 0.3": Mixture.temperature(0.3, "tokens", over="language"),
        "temperature 0.7": Mixture.temperature(0.7, "tokens", over="language"),
        "UniMax": Mixture.unimax(UNIMAX_EPOCHS if max_epochs is None else max_epochs, "tokens", over="language"),
    }
    found = {}
    for name, rule in rules.items():
        try:
            shares, _ = group_shares(token_shares(rule, sizes, rows), within)
        except UserError as error:
            log.warning("the baseline %s is left out: %s", name, error)
            continue
        found[name] = shares / shares.sum()
    return found
