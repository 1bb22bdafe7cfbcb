"""The loop: a run's steps, one ahead of what is recorded of them, with its evaluations and checkpoints in between."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.errors import StoppedError
from eurollm_jax.evaluation.perplexity import Measure, measure_heldout
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.param import Params
from eurollm_jax.parallel.distributed import any_process, is_first
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.parallel.programs import CompileTimes, compile_times
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.description import in_words
from eurollm_jax.training.inputs import Inputs, plan
from eurollm_jax.training.metrics import MetricsWriter, Peak
from eurollm_jax.training.progress import Progress
from eurollm_jax.training.recorder import Recorder
from eurollm_jax.training.replicas import ReplicaCheck
from eurollm_jax.training.rollback import Rollbacks
from eurollm_jax.training.step import Program, StepMetrics, TrainState
from eurollm_jax.training.stopping import Stopping, Wish
from eurollm_jax.training.trace import Trace, Tracer
from eurollm_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)

type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class Begun:
    """Where a stretch of training begins, and what it goes on from and adds to."""

    step: int  # steps done
    progress: Mapping[str, Any]  # of the checkpoint
    checkpoints: Checkpoints
    rollbacks: Rollbacks


@dataclass(frozen=True)
class Run:
    """What stays the same from a start of a run to its end."""

    experiment: Experiment
    inputs: Inputs
    layout: Layout
    program: Program
    measure: Measure
    folder: Path
    hashes: Mapping[str, str]  # of what the experiment's paths point to
    replicas: ReplicaCheck
    stopping: Stopping
    watchdog: Watchdog
    trace: Trace | None
    began: float  # of time.perf_counter()

    @property
    def batch_sizes(self) -> BatchSizes:
        """Those that the run reaches."""
        return self.experiment.batch_sizes.until(self.experiment.total_rows)


def trained(run: Run, state: TrainState, begun: Begun, facts: Mapping[str, Any], peak: Peak) -> TrainState:
    """Opens what a stretch of training writes to and reads from, and trains."""
    experiment, data, row = run.experiment, run.inputs.data, begun.progress["row"]
    if is_first():
        write_json(run.folder / "plan.json", plan(experiment, data) | {"parity": run.inputs.parity.describe()})
        run.inputs.tokenizer.save(run.folder / "tokenizer")  # for use when the original has moved
        for outdated in ("evaluation.json", "samples.json", "report.html"):
            (run.folder / outdated).unlink(missing_ok=True)
    log.info("%s", in_words(experiment, facts))
    part, parts = run.layout.part_of_rows(run.batch_sizes.sizes)
    jumps = begun.rollbacks.jumps
    recorded = begun.step - len(begun.progress.get("interval", ()))
    with (
        MetricsWriter(run.folder, resume_at=begun.step, facts=facts, recorded=recorded) as writer,
        Progress(experiment.name, experiment.steps, begun.step) as bar,
        closing(data.loader(row, run.batch_sizes, part, parts, stop_row=experiment.total_rows, jumps=jumps)) as batches,
    ):
        recorder = Recorder(experiment, data, writer, bar, begun.progress, peak, jumps)
        placed = ((after, run.layout.place_rows(batch, part, parts)) for after, batch in batches)
        with closing(Tracer(run.trace if is_first() else None, run.folder / "trace", recorder.clock)) as tracer:
            return _loop(run, state, begun, placed, recorder, tracer)


def _loop(
    run: Run,
    state: TrainState,
    begun: Begun,
    batches: Iterator[tuple[int, Batch]],
    recorder: Recorder,
    tracer: Tracer,
) -> TrainState:
    """To the last step. While a step is under way, the next batch is fetched and placed, and then the
    metrics of the step before are fetched."""
    experiment = run.experiment
    run.watchdog.phase("compiling")
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(_compiled, run, begun.progress["row"])
        coming = next(batches)  # the loader starts meanwhile
        train_step, compile_time = compiling.result()
    before: StepMetrics | None = None
    ended = time.perf_counter()
    recorder.clock.restart()
    for step in range(begun.step + 1, experiment.steps + 1):
        run.watchdog.phase(f"step {step}")
        last = step == experiment.steps
        run.stopping.ask()
        row, batch = coming
        tracer.before(step, state)
        state, metrics = train_step[len(batch.source)](state, batch)
        if not last:
            with recorder.clock.waiting(metrics.loss):
                coming = next(batches)
        tracer.after(step, metrics)
        if step == begun.step + 1:
            jax.block_until_ready(metrics)
            recorder.first_step(step, time.perf_counter() - run.began, compile_time)
        if recorder.due(step - 1):
            recorder.train(step - 1)
        recorder.add(metrics)
        jax.block_until_ready(before)  # one step is ahead, not more: who is asked to stop is not far from the answer
        before = metrics
        run.stopping.stepped(time.perf_counter() - ended)

        wish = run.stopping.answer()
        evaluating = last or step % experiment.evaluate_every == 0
        saving = experiment.has_permanent_checkpoint(step) or wish is not Wish.NONE
        comparing = experiment.watch.compares_replicas(step, saving=saving)
        ended = time.perf_counter()
        if not (evaluating or saving or comparing):
            continue
        jax.block_until_ready(metrics)
        if evaluating and jax.process_count() > 1:
            with recorder.clock.stopped():
                recorder.hosts(step)
        if recorder.due(step):
            recorder.train(step)
        with recorder.clock.stopped():
            if comparing:
                run.watchdog.phase("comparing replicas")
                run.replicas.check(state)
            score = _evaluated(run, step, state.params, recorder) if evaluating else None
            if saving:
                _saved(run, begun, step, state, row, recorder, score)
        if wish is Wish.STOP and not last:
            run.watchdog.phase("saving")
            begun.checkpoints.close()
            raise StoppedError(
                f"stopped after step {step} of {experiment.steps} by {run.stopping.reason}; all is saved in "
                f"{run.folder}, and the same command goes on."
            )
        ended = time.perf_counter()
    return state


def _evaluated(run: Run, step: int, params: Params, recorder: Recorder) -> float:
    """Measures on some of the held-out text; returns the mean of its bits per byte."""
    heldout = run.inputs.heldout
    run.watchdog.phase(f"evaluating after step {step}")
    start = time.perf_counter()
    rows, alive = run.experiment.evaluate_rows, run.watchdog.alive
    sums = measure_heldout(run.measure, params, heldout, run.layout, rows, alive=alive)
    return recorder.heldout(step, tuple(heldout.languages), sums, time.perf_counter() - start)


def _saved(
    run: Run, begun: Begun, step: int, state: TrainState, row: int, recorder: Recorder, score: float | None
) -> None:
    """Begins a checkpoint of a state that may be built on."""
    run.watchdog.phase(f"saving after step {step}")
    recorder.require_sound(step)
    if any_process(not recorder.secure()):
        begun.checkpoints.refuse(f"the records before it cannot be written to {run.folder}")
        return
    start = time.perf_counter()
    progress = {
        "row": row,
        "data": run.inputs.data.describe(),
        "rollbacks": begun.rollbacks.describe(),
        **recorder.progress(),
    }
    begun.checkpoints.save(step, state, progress, score=score)
    seconds = time.perf_counter() - start
    run.stopping.saved(max(seconds, begun.checkpoints.longest))
    recorder.checkpoint(step, seconds)


def _compiled(run: Run, row: int) -> tuple[dict[int, TrainStep], CompileTimes]:
    """The train step for all batch sizes from `row` on: what does not fit into memory shows now, not weeks later."""
    length = run.experiment.data.sequence_length
    with compile_times() as times:
        steps = {size: run.program.compile_train(size, length) for size in run.batch_sizes.from_row(row).sizes}
    return steps, times
