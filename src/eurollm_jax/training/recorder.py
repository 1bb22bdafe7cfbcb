"""Turns what the step measured into the records of a run: metrics.jsonl, TensorBoard, and the bar on the terminal."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.data.loader import Data
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.loss import SourceSums
from eurollm_jax.model.moe import Routing
from eurollm_jax.model.transformer import flops_per_token
from eurollm_jax.parallel.programs import CompileTimes
from eurollm_jax.training.metrics import Clock, MetricsWriter, Peak
from eurollm_jax.training.progress import Progress
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.step import StepMetrics


class Recorder:
    """Keeps the count of useful tokens of each source; rows follow from the step."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        writer: MetricsWriter,
        bar: Progress,
        clock: Clock,
        tokens: list[int],
        peak: Peak,
    ) -> None:
        self.clock = clock
        self._sizes, self._data, self._writer, self._bar = experiment.batch_sizes, data, writer, bar
        self._tokens = np.array(tokens, np.int64)
        # Of all steps, now: what is computed on the device later would wait there for the step that is under way.
        rate = experiment.schedule.build(experiment.steps)
        self._learning_rate = np.asarray(jax.vmap(rate)(jnp.arange(experiment.steps)))
        self._flops_per_token = flops_per_token(experiment.model, experiment.data.sequence_length)
        self._peak = peak.flops
        self._skip, self._last = experiment.skip, experiment.steps

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps for the records that follow it."""
        return {"seconds": self.clock.total, "tokens": self._tokens.tolist()}

    def first_step(self, step: int, seconds: float, compiling: CompileTimes) -> None:
        """Records what the start cost: `seconds` until the first step was done, and the train program's share."""
        self._writer.write(
            {
                "kind": "first_step",
                "step": step,
                "seconds_to_first_step": seconds,
                "lowering_seconds": compiling.lowering,
                "compile_seconds": compiling.compiling,
                "programs": compiling.programs,
                "programs_found": compiling.found,
            }
        )

    def train(self, step: int, interval: Sequence[StepMetrics]) -> None:
        """Records the steps that end with `step`; waits for the last of them."""
        told: list[StepMetrics] = jax.device_get(list(interval))
        seconds, waited = self.clock.lap()
        tokens = np.sum([metrics.sources.tokens for metrics in told], axis=0)
        self._tokens += tokens
        taken = [metrics for metrics in told if not metrics.skipped]
        if self._skip is not None:
            self._skipped(self._skip, step, told)
            if not taken:
                return
        losses, norms, sums, routings, _ = zip(*taken, strict=True)
        nats, _, byte_counts = (np.sum(np.stack(field), axis=0) for field in zip(*sums, strict=True))
        row = self._sizes.row_of_step(step)
        rate = float(tokens.sum()) / seconds
        figures = {
            "loss": float(np.mean(losses)),
            "bits_per_byte": bits_per_byte(float(nats.sum()), int(byte_counts.sum())),
            "learning_rate": float(self._learning_rate[step - 1]),
            "grad_norm": float(np.mean(norms)),
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._peak,
            "data_wait": waited / seconds,
            "skipped": len(told) - len(taken),
            **_router_figures(routings),
        }
        per_source = zip(
            self._data.source_names, self._data.schedule.counts(row), self._tokens, nats, byte_counts, strict=True
        )
        record = {
            "kind": "train",
            "step": step,
            "row": row,
            "tokens": int(self._tokens.sum()),
            **figures,
            "seconds": self.clock.total,
            "sources": {
                name: {"rows": int(rows), "tokens": int(read), "nats": float(lost), "bytes": int(size)}
                for name, rows, read, lost, size in per_source
            },
        }
        if not np.isfinite(figures["loss"]) or not np.isfinite(figures["grad_norm"]):
            raise UserError(
                f"the loss is {figures['loss']} and the gradient's norm {figures['grad_norm']} at step {step}: "
                "lower the learning rate or change the seed; the checkpoints before this step are kept."
            )
        self._writer.write(record)
        self._writer.curves(step, figures)
        self._bar.show(record)

    def _skipped(self, skip: SkipStep, last: int, told: Sequence[StepMetrics]) -> None:
        """Records which of the steps that end with `last` were skipped; UserError where they are too many in a row."""
        for step, metrics in enumerate(told, last + 1 - len(told)):
            in_a_row, loss, norm = int(metrics.skipped), float(metrics.loss), float(metrics.grad_norm)
            skip.require(step, in_a_row, loss, norm, ends=step == self._last)
            if in_a_row:
                seen = {"loss": loss, "grad_norm": norm}
                finite = {name: value if np.isfinite(value) else None for name, value in seen.items()}
                self._writer.write({"kind": "skipped", "step": step, **finite})
                self._bar.say(f"step {step} is skipped: its loss is {loss:.4g} and its gradient's norm {norm:.4g}")

    def checkpoint(self, step: int, seconds: float) -> None:
        """Records how long saving held the loop after `step`."""
        self._writer.write({"kind": "checkpoint", "step": step, "stall_seconds": seconds})

    def heldout(self, step: int, names: Sequence[str], sums: SourceSums, seconds: float) -> None:
        """Records a held-out measurement after `step`, which took `seconds`."""
        per_source = {
            name: bits_per_byte(float(nats), int(size))
            for name, nats, size in zip(names, sums.nats, sums.bytes, strict=True)
        }
        macro = float(np.mean(list(per_source.values())))
        self._writer.write(
            {
                "kind": "evaluation",
                "step": step,
                "row": self._sizes.row_of_step(step),
                "seconds": self.clock.total,
                "bits_per_byte": per_source,
                "macro_bits_per_byte": macro,
                "evaluation_seconds": seconds,
            }
        )
        self._writer.curves(step, {"heldout/mean": macro, **{f"heldout/{k}": v for k, v in per_source.items()}})
        self._bar.say(f"step {step}: held out {macro:.3f} bits per byte, the mean over {len(per_source)} sources")


def _router_figures(routings: Sequence[Routing | None]) -> dict[str, float]:
    """Of a mixture of experts, means over the interval's steps; the busiest expert's load is 1 where all are even."""
    found = [routing for routing in routings if routing is not None]
    if not found:
        return {}
    load = np.mean([routing.load for routing in found], axis=0)
    return {
        "router_balance": float(np.mean([routing.balance for routing in found])),
        "router_z": float(np.mean([routing.z for routing in found])),
        "router_busiest": float(load.max() * load.shape[-1]),
    }
