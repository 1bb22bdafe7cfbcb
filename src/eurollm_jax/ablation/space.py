"""Space: the mixtures that a study may try, as shares of its groups; and what of it a store cannot serve, refused by
name.

A point of the space is one share of the tokens for each group. The shares of the sources within a group are the
prior's everywhere. A prior with stages counts with its mean over a proxy's run.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation.baselines import baseline_shares, group_shares, token_shares
from eurollm_jax.ablation.bounds import LEAST, SLACK, epoch_bounds, onto_bounds, share_bounds
from eurollm_jax.ablation.study import Study, Target
from eurollm_jax.data.groups import Corpus, SourceSize
from eurollm_jax.data.loader import Data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.recipe import Level
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import HeldOut
from eurollm_jax.languages import LANGUAGES, official, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Space:
    """G groups of sources of the training store, and L languages of held-out text."""

    groups: tuple[str, ...]  # in the study's order; those of a level sorted
    within: tuple[Mapping[str, float], ...]  # of each group: source -> share of the group's tokens, sum 1
    prior: Float[np.ndarray, "G"]  # shares of tokens, sum 1
    lower: Float[np.ndarray, "G"]  # bounds of every mixture that is tried or proposed
    upper: Float[np.ndarray, "G"]
    sizes: Mapping[str, SourceSize]  # of the training store
    languages: tuple[str, ...]  # that are held out, by code, sorted
    weights: Float[np.ndarray, "L"]  # of the target, sum 1
    holds: Float[np.ndarray, "L G"]  # share of each group's tokens that are of each held-out language
    max_epochs: float | None = None  # of the constraints

    def mixture(self, shares: Sequence[float] | Float[np.ndarray, "G"]) -> Mixture:
        """The mixture with these shares of the groups. Groups with less than `bounds.LEAST` are left out, and the
        others get what that sets free."""
        found = np.asarray(shares, np.float64)
        if found.shape != (len(self.groups),) or not (found >= -SLACK).all() or abs(found.sum() - 1) > 1e-6:
            raise ValueError(f"{found} are no shares of {len(self.groups)} groups")
        found = np.where(found < LEAST, 0.0, found)
        found = found / found.sum()
        sources = {
            name: float(share) * part
            for share, members in zip(found, self.within, strict=True)
            if share > 0
            for name, part in members.items()
        }
        return Mixture.shares(sources, "tokens", over="source")

    def baselines(self, tokens: float) -> dict[str, Float[np.ndarray, "G"]]:
        """Group shares by the name of a rule: the prior, and `baselines.baseline_shares` for a run of so many tokens.

        Only their group shares are the rule's: within the groups they get the prior's shares, as all mixtures here.
        One that breaks a bound is moved onto the bounds and has "(within bounds)" in its name.
        """
        found = {}
        for name, shares in baseline_shares(self.within, self.sizes, tokens, self.max_epochs).items():
            broken = (shares < self.lower - 1e-6).any() or (shares > self.upper + 1e-6).any()
            found[f"{name} (within bounds)" if broken else name] = onto_bounds(shares, self.lower, self.upper)
        return {**found, "prior": self.prior}

    def baseline(self, name: str, tokens: float) -> Float[np.ndarray, "G"]:
        """One of them by its rule's name, within the bounds. Raises UserError for one that is not there."""
        found = self.baselines(tokens)
        shares = found.get(name, found.get(f"{name} (within bounds)"))
        if shares is None:
            raise UserError(f"there is no baseline {name!r} for this study: it has {', '.join(found)}")
        return shares


def open_space(study: Study, data: Data, heldout: HeldOut) -> Space:
    """The space of a study whose proxies read `data`. Raises UserError for whatever does not fit: see `build_space`."""
    for store in data.stores:
        if store.tokenizer_sha256 != heldout.store.tokenizer_sha256:
            raise UserError(
                f"study {study.name!r}: {store.path} and {heldout.store.path} were prepared with different "
                "tokenizers: prepare one of them again"
            )
    return build_space(study, data.sizes, heldout.languages)


def build_space(study: Study, sizes: Mapping[str, SourceSize], languages: Iterable[str]) -> Space:
    """The space over sources of these sizes and held-out text in these languages.

    Raises UserError for a group, language or source that is not there; groups that overlap, or that leave out what the
    prior reads; a group that the prior does not read; targets that are no weights; and bounds that leave no mixture or
    that the prior breaks.
    """
    try:
        return _build_space(study, sizes, tuple(sorted(languages)))
    except UserError as error:
        raise UserError(f"study {study.name!r}: {error}") from None


def _build_space(study: Study, sizes: Mapping[str, SourceSize], languages: tuple[str, ...]) -> Space:
    rows = study.proxy.total_rows
    mixture = study.proxy.data.mixture if study.prior is None else study.prior
    shares = token_shares(mixture, sizes, rows)
    if len(mixture.stages) > 1:
        log.info("the prior has %d stages: its mean over a proxy's run counts", len(mixture.stages))
    members = _members(study.groups, Corpus(sizes), shares)
    within, prior = _prior(members, shares, sizes)
    tokens_per_row = max(sizes[name].tokens / sizes[name].rows for part in within for name in part)
    tokens = max(rows * tokens_per_row, _target_tokens(study))
    max_epochs = study.constraints.max_epochs
    if max_epochs is not None and not (math.isfinite(max_epochs) and max_epochs > 0):
        raise UserError(f"constraints: max_epochs={max_epochs} must be above 0")
    epochs = [] if max_epochs is None else epoch_bounds(within, sizes, max_epochs, tokens)
    lower, upper = share_bounds(study.constraints, tuple(members), prior, epochs)
    _tell_of_unmatched(members, within, sizes, languages, weights := _weights(study.targets, languages))
    holds = [
        [sum(q for name, q in part.items() if sizes[name].language == code) for part in within] for code in languages
    ]
    return Space(
        tuple(members),
        within,
        prior,
        lower,
        upper,
        sizes,
        languages,
        weights,
        np.array(holds, np.float64).reshape(len(languages), len(members)),
        max_epochs,
    )


def _target_tokens(study: Study) -> float:
    """The most that a run may read whose mixture comes from the study: the one that is meant, or the confirmation; 0
    where there is neither."""
    meant = study.constraints.tokens
    if meant is not None and meant < 1:
        raise UserError(f"constraints: tokens={meant} must be 1 or more")
    if study.confirmation is None:
        return meant or 0.0
    larger = study.confirmation.experiment
    return max(meant or 0.0, larger.total_rows * larger.data.sequence_length)


def _members(
    groups: Level | Mapping[str, Sequence[str]], corpus: Corpus, shares: Mapping[str, float]
) -> dict[str, list[str]]:
    """The sources of each group, sorted. Of a level, the groups that the prior reads."""
    if isinstance(groups, str):
        if groups not in get_args(Level):
            raise UserError(f"groups is 'family', 'language' or 'source', or names by group, not {groups!r}")
        return dict(sorted(corpus.grouped(shares, groups).items()))
    members: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for group, names in groups.items():
        if isinstance(names, str):
            raise UserError(f"groups: {group!r} is the text {names!r}: write ({names!r},)")
        found: set[str] = set()
        for name in names:
            try:
                found |= corpus.members(name)
            except UserError as error:
                said = str(error).removeprefix("the mixture ")
                raise UserError(f"groups: {group!r} {said}") from None
        twice = sorted(found & group_of.keys())
        if twice:
            others = ", ".join(sorted({repr(group_of[name]) for name in twice}))
            raise UserError(f"groups: {others} and {group!r} both have {', '.join(twice)}: take it out of one of them")
        group_of |= dict.fromkeys(found, group)
        members[group] = sorted(found)
    return members


def _prior(
    members: Mapping[str, list[str]], shares: Mapping[str, float], sizes: Mapping[str, SourceSize]
) -> tuple[tuple[Mapping[str, float], ...], Float[np.ndarray, "G"]]:
    """(the shares within each group, those of the groups) of the prior, of which `shares` are the sources'."""
    within = [{name: shares[name] for name in names if name in shares} for names in members.values()]
    prior, missing = group_shares(shares, within)
    if missing:
        named = ", ".join(_with_language(name, sizes) for name in missing[:6]) + (" ..." if len(missing) > 6 else "")
        raise UserError(
            f"groups: no group has {named}, and the prior gives {'it' if len(missing) == 1 else 'them'} "
            f"{sum(shares[name] for name in missing):.2%} of the tokens: add {'it' if len(missing) == 1 else 'them'} "
            "to a group, or leave them out of the prior by .without(...)"
        )
    if len(within) < 2:
        raise UserError(f"groups: {', '.join(members) or 'none'} is all there is, and shares need two groups to move")
    prior = prior / prior.sum()
    for group, share in zip(members, prior, strict=True):
        if share < LEAST:
            raise UserError(
                f"groups: the prior gives {group!r} {share:.2g} of the tokens, and at least {LEAST:g} is needed: drop "
                "the group, or give it a share in the prior"
            )
    sums = [math.fsum(part.values()) for part in within]
    return tuple({n: q / total for n, q in part.items()} for part, total in zip(within, sums, strict=True)), prior


def _tell_of_unmatched(
    groups: Iterable[str],
    within: Sequence[Mapping[str, float]],
    sizes: Mapping[str, SourceSize],
    languages: Sequence[str],
    weights: Float[np.ndarray, "L"],
) -> None:
    """In the log: what is trained on and not measured, and what the target counts and no group has."""
    unmeasured = {
        group: sorted({sizes[name].language or repr(name) for name in part if sizes[name].language not in languages})
        for group, part in zip(groups, within, strict=True)
    }
    if named := [f"{', '.join(found)} of {group}" for group, found in unmeasured.items() if found]:
        log.warning(
            "languages without held-out text, so the target does not count what is learnt of them: %s", "; ".join(named)
        )
    read = {sizes[name].language for part in within for name in part}
    counted = [code for code, weight in zip(languages, weights, strict=True) if weight > 0]
    if unread := [code for code in counted if code not in read]:
        log.warning(
            "languages that the target counts (%.0f%% of its weight) and that no group trains on: %s",
            100 * sum(weights[languages.index(code)] for code in unread), ", ".join(unread),
        )  # fmt: skip


def _with_language(name: str, sizes: Mapping[str, SourceSize]) -> str:
    language = LANGUAGES.get(sizes[name].language)
    return repr(name) if language is None else f"{name!r} ({language.name})"


def _weights(targets: Target | Mapping[str, float], languages: tuple[str, ...]) -> Float[np.ndarray, "L"]:
    """Of each language, sum 1."""
    if isinstance(targets, str):
        if targets not in get_args(Target):
            raise UserError(f"targets is 'uniform' or 'official', or weights by language, not {targets!r}")
        wanted = {language.code for language in official()}
        found = np.array([float(targets == "uniform" or code in wanted) for code in languages])
        if not found.sum():
            raise UserError("targets: no official language is held out: hold some out, or name others")
        if targets == "official" and (absent := sorted(wanted - set(languages))):
            log.warning("official languages without held-out text, which the target leaves out: %s", ", ".join(absent))
        return found / found.sum()
    weights = dict.fromkeys(languages, 0.0)
    seen: dict[str, str] = {}
    for name, weight in targets.items():
        try:
            code = resolve(name).code
        except UserError as error:
            raise UserError(f"targets: {error}") from None
        if code not in weights:
            raise UserError(
                f"targets: {name!r} has no held-out text: hold some out, or take it away; there is text in "
                f"{', '.join(languages)}"
            )
        if code in seen:
            raise UserError(f"targets: {seen[code]!r} and {name!r} are one language: keep one of them")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"targets: {name!r} has the weight {weight}: give 0 or more")
        seen[code] = name
        weights[code] = float(weight)
    total = math.fsum(weights.values())
    if total <= SLACK:
        raise UserError("targets: the weights sum to 0: give a language one above 0")
    return np.array(list(weights.values())) / total
