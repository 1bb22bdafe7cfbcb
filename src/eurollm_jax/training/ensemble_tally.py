"""What an ensemble knows of its members as they train: losses, tokens, and which of them have diverged, and when."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.loss import SourceSums
from eurollm_jax.training.ensemble_measurements import Measurement
from eurollm_jax.training.step import StepMetrics

log = logging.getLogger(__name__)

BEYOND = 1.0
"""Nats of a token, above those of a uniform guess over the vocabulary, beyond which a member that is warmed up has
diverged. A fresh model costs half the variance of its logits more than the guess, so up to about 0.5 (0.45 of one of
width 16); one that learns is soon below it. Held-out text counts in proportion to what the member reads of its
language: of one that it does not read, a sound model may be surer in being wrong than a guess is."""

FAR_BEYOND = 10.0
"""Times the guess, over all held-out text, of a member that reads none of its languages."""

REAL, WHOLE = ("loss", "nats"), ("bytes", "taken", "skipped", "tokens")  # sums of each member since the last record


class Tally:
    """Takes what the steps measure. Which steps have a record depends on the step alone, and what is summed up since
    the last one is part of a checkpoint's progress: an ensemble that was stopped leaves the same records as another.
    """

    def __init__(
        self,
        members: Sequence[Experiment],
        sources: Sequence[str],
        reads: Float[np.ndarray, "K S"],
        progress: Mapping[str, Any],
    ) -> None:
        """`sources` are those of held-out text; `reads` are the shares of each member's rows in the language of each;
        `progress` is that of the checkpoint that training goes on from."""
        first = members[0]
        self._names, self._sources = [member.name for member in members], tuple(sources)
        none = ~reads.any(axis=1, keepdims=True)
        self._guess = math.log(first.model.vocab_size)  # nats of a token
        self._weights = np.where(none, 1.0, reads)
        self._most = np.where(none[:, 0], FAR_BEYOND * self._guess, BEYOND + self._guess)
        self._warmups = [member.schedule.warmup for member in members]
        self._skip, self._last, self._every = first.skip, first.steps, first.log_every
        self._permanent, self._row_of_step = first.has_permanent_checkpoint, first.batch_sizes.row_of_step
        self._step: int = progress["step"]  # until which all is taken in
        self._tokens = np.array(progress["tokens"], np.int64)
        self._diverged: list[str] = list(progress["diverged"])
        self._sums = {name: np.array(found) for name, found in progress["sums"].items()}
        self._coming: list[StepMetrics] = []

    @staticmethod
    def before(members: int) -> dict[str, Any]:
        """The progress before the first step."""
        real, whole = ({name: [zero] * members for name in names} for names, zero in ((REAL, 0.0), (WHOLE, 0)))
        return {"step": 0, "tokens": [0] * members, "diverged": [""] * members, "sums": real | whole}

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps for the records that follow it; waits for the last step."""
        self.settle()
        return {
            "step": self._step,
            "tokens": self._tokens.tolist(),
            "diverged": list(self._diverged),
            "sums": {name: found.tolist() for name, found in self._sums.items()},
        }

    @property
    def diverged(self) -> dict[str, str]:
        """Why, of each member that has."""
        return {name: why for name, why in zip(self._names, self._diverged, strict=True) if why}

    def add(self, metrics: StepMetrics) -> None:
        """Takes what the next step measured; it is fetched when it is needed."""
        self._coming.append(metrics)

    def due(self, step: int) -> bool:
        """Whether there is to be a record that ends with `step`, and it is not written yet."""
        unwritten = bool(self._coming) or bool(self._sums["taken"].any() or self._sums["skipped"].any())
        return unwritten and (step % self._every == 0 or self._permanent(step))

    def settle(self) -> None:
        """Waits for the steps so far, and takes them in."""
        coming, self._coming = self._coming, []
        for metrics in jax.device_get(coming):
            self._step += 1
            self._take(metrics)

    def _take(self, metrics: StepMetrics) -> None:
        finite = np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm)
        taken = finite if self._skip is None else metrics.skipped == 0
        tokens = metrics.sources.tokens.sum(1, np.int64)
        added = {
            "loss": np.where(taken, metrics.loss, 0).astype(np.float64),
            "nats": np.where(taken, metrics.sources.nats.sum(1, np.float64), 0),
            "bytes": np.where(taken, metrics.sources.bytes.sum(1, np.int64), 0),
            "taken": taken.astype(np.int64),
            "skipped": (~taken).astype(np.int64),
            "tokens": tokens,
        }
        self._tokens += tokens
        self._sums = {name: found + added[name] for name, found in self._sums.items()}
        if self._skip is None:
            in_a_row, limit = (~taken).astype(np.int64), 0
        else:
            in_a_row, limit = metrics.skipped, 1 if self._step == self._last else self._skip.at_most
        for member in np.flatnonzero(in_a_row > limit).tolist():
            skipped = "" if self._skip is None else f", and {in_a_row[member]} steps in a row were skipped"
            figures = f"the loss is {metrics.loss[member]:.4g} and the gradient's norm {metrics.grad_norm[member]:.4g}"
            self._mark(member, f"at step {self._step} {figures}{skipped}")

    def _mark(self, member: int, why: str) -> None:
        """Once, and for good: nothing that a member learns after this answers a question."""
        if not self._diverged[member]:
            self._diverged[member] = why
            log.error("MEMBER %s HAS DIVERGED: %s. The others go on.", self._names[member], why)

    def record(self, step: int, seconds: float) -> dict[str, Any]:
        """Of the steps that end with `step` and took so long; waits for the last of them.

        Losses are means over the steps that a member took; `loss` and `bits_per_byte` are of all members that are
        sound. None stands where there are no such steps.
        """
        self.settle()
        sums, self._sums = self._sums, {name: np.zeros_like(found) for name, found in self._sums.items()}
        losses = sums["loss"] / np.maximum(sums["taken"], 1)
        sound = np.array([not why for why in self._diverged]) & (sums["taken"] > 0)
        nats, byte_count = float(sums["nats"][sound].sum()), int(sums["bytes"][sound].sum())
        shown = [float(loss) if taken else None for loss, taken in zip(losses, sums["taken"], strict=True)]
        return {
            "kind": "train",
            "step": step,
            "row": self._row_of_step(step),
            "loss": float(losses[sound].mean()) if sound.any() else None,
            "bits_per_byte": bits_per_byte(nats, byte_count) if byte_count else None,
            "losses": dict(zip(self._names, shown, strict=True)),
            "skipped": dict(zip(self._names, sums["skipped"].tolist(), strict=True)),
            "diverged": sorted(self.diverged),
            "tokens_per_second": float(sums["tokens"].sum()) / seconds,
        }

    def measured(self, step: int, sums: SourceSums, *, complete: bool) -> list[Measurement]:
        """What `sums` [K, sources] of held-out text say of each member after `step`, the last one; waits for it."""
        self.settle()
        for member in np.flatnonzero(~np.isfinite(sums.nats).all(1)).tolist():
            self._mark(member, f"by step {step} the loss on held-out text is not finite")
        self._mark_useless(step, sums, complete=complete)
        found = []
        for member, name in enumerate(self._names):
            nats, tokens, byte_counts = (dict(zip(self._sources, of[member].tolist(), strict=True)) for of in sums)
            rows, read = self._row_of_step(step), int(self._tokens[member])
            why = self._diverged[member]
            found.append(Measurement(name, step, rows, read, complete, why, nats, tokens, byte_counts))
        return found

    def _mark_useless(self, step: int, sums: SourceSums, *, complete: bool) -> None:
        """Marks members that predict held-out text worse than one that knows nothing, once they are warmed up."""
        per_token, bytes_per_token = (of / np.maximum(sums.tokens, 1) for of in (sums.nats, sums.bytes))
        total = self._weights.sum(axis=1)
        cost = (self._weights * per_token).sum(axis=1) / total  # nats of a token
        size = (self._weights * bytes_per_token).sum(axis=1) / total  # bytes of a token
        for member in np.flatnonzero(cost > self._most).tolist():
            if complete or step > self._warmups[member]:
                found, guess = (nats / math.log(2) / size[member] for nats in (cost[member], self._guess))
                shown = f"{found:,.0f}" if 100 < found < 1e9 else f"{found:.4g}"
                self._mark(
                    member,
                    f"by step {step} held-out text costs {shown} bits per byte, more than a uniform guess would "
                    f"({guess:.3g})",
                )
