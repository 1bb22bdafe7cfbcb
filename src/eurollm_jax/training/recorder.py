"""Turns what the step measured into the records of a run: metrics.jsonl, TensorBoard, and the bar on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.data.jumps import Jumps
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
from eurollm_jax.training.slow_hosts import slow_hosts
from eurollm_jax.training.step import StepMetrics


class Recorder:
    """Keeps the steps since the last record, and the count of useful tokens of each source; rows follow from the step.

    Which steps have a record depends on the step alone, never on when a checkpoint was written: a run that was stopped
    anywhere leaves the same records as one that was not.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        writer: MetricsWriter,
        bar: Progress,
        progress: Mapping[str, Any],
        peak: Peak,
        jumps: Jumps,
    ) -> None:
        """`progress` is that of the checkpoint that training goes on from, `jumps` the rows that it leaves out."""
        self.clock = Clock(progress["seconds"], tuple(progress.get("lap", (0.0, 0.0))))
        self._sizes, self._data, self._writer, self._bar = experiment.batch_sizes, data, writer, bar
        self._tokens = np.array(progress["tokens"], np.int64)
        self._jumps = jumps
        self._interval = [_decoded(step) for step in progress.get("interval", [])]
        # Of all steps, now: what is computed on the device later would wait there for the step that is under way.
        rate = experiment.schedule.build(experiment.steps)
        self._learning_rate = np.asarray(jax.vmap(rate)(jnp.arange(experiment.steps)))
        self._flops_per_token = flops_per_token(experiment.model, experiment.data.sequence_length)
        self._peak = peak.flops
        self._skip, self._last, self._every = experiment.skip, experiment.steps, experiment.log_every
        self._permanent = experiment.has_permanent_checkpoint  # whose records say what an export has read

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps for the records that follow it; waits for the last step."""
        self._interval = jax.device_get(self._interval)
        return {
            "seconds": self.clock.total,
            "lap": list(self.clock.so_far()),
            "tokens": self._tokens.tolist(),
            "interval": [_encoded(step) for step in self._interval],
        }

    def add(self, metrics: StepMetrics) -> None:
        """Takes what the next step measured; it is fetched when it is needed."""
        self._interval.append(metrics)

    def due(self, step: int) -> bool:
        """Whether there is to be a record that ends with `step`, and it is not written yet."""
        return bool(self._interval) and (step % self._every == 0 or self._permanent(step))

    def require_sound(self, step: int) -> None:
        """Waits for `step`, the last one. Raises UserError where what came after the last record is unsound."""
        self._interval = jax.device_get(self._interval)
        for number, metrics in enumerate(self._interval, step + 1 - len(self._interval)):
            loss, norm = float(metrics.loss), float(metrics.grad_norm)
            if self._skip is not None:
                self._skip.require(number, int(metrics.skipped), loss, norm, ends=number == self._last)
            elif not np.isfinite(loss) or not np.isfinite(norm):
                raise UserError(
                    f"the loss is {loss} and the gradient's norm {norm} at step {number}: lower the learning rate or "
                    "change the seed; the checkpoints before this step are kept."
                )

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

    def train(self, step: int) -> None:
        """Records the steps that end with `step`; waits for the last of them."""
        self.require_sound(step)
        told, self._interval = self._interval, []
        seconds, waited = self.clock.lap()
        tokens = np.sum([metrics.sources.tokens for metrics in told], axis=0)
        self._tokens += tokens
        self._skipped(step, told)
        taken = [metrics for metrics in told if not metrics.skipped]
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
            self._data.source_names,
            self._jumps.counts(self._data.schedule, row),
            self._tokens,
            nats,
            byte_counts,
            strict=True,
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
        self._writer.write(record)
        self._writer.curves(step, figures)
        self._bar.show(record)

    def _skipped(self, last: int, told: Sequence[StepMetrics]) -> None:
        """Records which of the steps that end with `last` were skipped."""
        for step, metrics in enumerate(told, last + 1 - len(told)):
            if metrics.skipped:
                seen = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}
                finite = {name: value if np.isfinite(value) else None for name, value in seen.items()}
                self._writer.write({"kind": "skipped", "step": step, **finite})
                loss, norm = seen.values()
                self._bar.say(f"step {step} is skipped: its loss is {loss:.4g} and its gradient's norm {norm:.4g}")

    def checkpoint(self, step: int, seconds: float) -> None:
        """Records how long saving held the loop after `step`."""
        self._writer.write({"kind": "checkpoint", "step": step, "stall_seconds": seconds})

    def hosts(self, step: int) -> None:
        """Records what each process computes and waits, and says which are slow; all processes call this."""
        seconds, waited = self.clock.so_far()
        self._writer.write({"kind": "hosts", "step": step, **slow_hosts(waited, seconds)})

    def secure(self) -> bool:
        """Puts all records on disk, before a checkpoint that comes after them; whether that was done."""
        return self._writer.secure()

    def heldout(self, step: int, names: Sequence[str], sums: SourceSums, seconds: float) -> float:
        """Records a held-out measurement after `step`, which took `seconds`; returns the mean of its bits per byte."""
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
        return macro


def _encoded(metrics: StepMetrics) -> dict[str, Any]:
    """As JSON keeps it, exactly: a float32 is a float64."""
    return {
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "sources": {name: field.tolist() for name, field in metrics.sources._asdict().items()},
        "routing": None
        if metrics.routing is None
        else {name: field.tolist() for name, field in metrics.routing._asdict().items()},
        "skipped": int(metrics.skipped),
    }


def _decoded(encoded: Mapping[str, Any]) -> StepMetrics:
    def real(value: Any) -> Any:
        return np.array(value, np.float32)

    def whole(value: Any) -> Any:
        return np.array(value, np.int32)

    sources, routing = encoded["sources"], encoded["routing"]
    return StepMetrics(
        real(encoded["loss"]),
        real(encoded["grad_norm"]),
        SourceSums(real(sources["nats"]), whole(sources["tokens"]), whole(sources["bytes"])),
        None if routing is None else Routing(**{name: real(field) for name, field in routing.items()}),
        whole(encoded["skipped"]),
    )


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
