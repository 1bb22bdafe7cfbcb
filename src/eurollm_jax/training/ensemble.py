"""Trains many small experiments at once: the loop over the program of ensemble_step.py, with a folder for all of them.

What a member learns is what `training.run.train` would have it learn alone, up to the rounding of products that are
computed together: the same first weights, the same rows in the same order, the same schedule. Two things differ. A
member that diverges does not end the others and does not go back: it is marked, and trains on to no purpose. And
members have no samples and no run directories: what is kept is what was measured of them.

    FOLDER/ensemble.json        which ensemble this is: the members' identities, hashes, versions
    FOLDER/measurements.jsonl   held-out nats of every source for every member, along the run and at its end
    FOLDER/metrics.jsonl        losses of training
    FOLDER/checkpoints/         states with a leading axis of members
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.param import Params
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import flops_per_token
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.parallel.programs import compile_times
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.ensemble_inputs import EnsembleInputs, claim_folder, open_ensemble, require_alike
from eurollm_jax.training.ensemble_measurements import (
    Measurement,
    add_measurements,
    drop_measurements,
    is_finished,
    measure_members,
    read_measurements,
)
from eurollm_jax.training.ensemble_step import EnsembleProgram, build_ensemble, layout_of
from eurollm_jax.training.ensemble_tally import Tally
from eurollm_jax.training.history import logged, note
from eurollm_jax.training.lock import locked
from eurollm_jax.training.metrics import Clock, MetricsWriter, peak_of
from eurollm_jax.training.progress import Progress
from eurollm_jax.training.step import StepMetrics, TrainState
from eurollm_jax.training.stopping import Stopping, Wish
from eurollm_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ensemble:
    """What stays the same from a start of an ensemble to its end."""

    members: tuple[Experiment, ...]
    inputs: EnsembleInputs
    program: EnsembleProgram
    folder: Path
    checkpoints: Checkpoints
    stopping: Stopping
    watchdog: Watchdog
    began: float  # of time.perf_counter()

    @property
    def shared(self) -> Experiment:
        """Any member: of what all have in common."""
        return self.members[0]

    @property
    def batch_sizes(self) -> BatchSizes:
        """Those that the ensemble reaches."""
        return self.shared.batch_sizes.until(self.shared.total_rows)


def train_ensemble(
    members: Sequence[Experiment],
    folder: Path,
    *,
    question: str,
    time_limit: float | None = None,
    began: float | None = None,
) -> list[Measurement]:
    """Trains all members to their last step in one program, going on from where the folder stands; returns all that
    was measured of them. One that is finished is not trained, nor compiled, again.

    Members agree in all but name, seed, schedule, data.mixture and data.seed; how often is logged, measured and saved,
    the first one says. They lie on as many devices as their number divides by. `question` is kept in the folder. Raises
    StoppedError before `time_limit` seconds from `began`, of time.perf_counter(), are over, and where a signal asks
    for it, with all saved; and UserError for what the user can mend.
    """
    began = time.perf_counter() if began is None else began
    if jax.process_count() > 1:
        raise UserError(
            f"an ensemble is trained by one process, and there are {jax.process_count()}: start one alone, which uses "
            "all devices that it sees."
        )
    require_alike(members)
    shared = members[0]
    with RollCall() as roll, Watchdog(shared.watch, roll) as watchdog:
        watchdog.phase("opening inputs")
        inputs = open_ensemble(members)
        watchdog.phase("claiming the folder")
        claim_folder(folder, members, inputs, question)
        if is_finished(found := read_measurements(folder), [member.name for member in members]):
            log.info("%s is complete: all %d members are trained", folder, len(members))
            return found
        program = _program(members, inputs)
        layout, minutes = program.layout, shared.saving.minutes
        with (
            locked(folder),
            logged(folder),
            Stopping(layout, time_limit=time_limit, began=began, save_minutes=minutes) as stopping,
        ):
            watchdog.keep(folder)
            watchdog.phase("restoring")
            checkpoints = Checkpoints(
                folder / "checkpoints",
                saving=shared.saving,
                permanent=shared.has_permanent_checkpoint,
                decay_begins=shared.decay_begins,
                alive=watchdog.alive,
            )
            run = _Ensemble(tuple(members), inputs, program, folder, checkpoints, stopping, watchdog, began)
            try:
                _go_on(run)
            except BaseException as error:
                with suppress(OSError):  # which would take the place of the error
                    note(folder, "end", how=f"{type(error).__name__}: {error}")
                raise
    return read_measurements(folder)


def _program(members: Sequence[Experiment], inputs: EnsembleInputs) -> EnsembleProgram:
    shared, devices = members[0], jax.devices()
    layout = layout_of(len(members), devices)
    if idle := len(devices) - layout.mesh.size:
        log.warning("%d members are dealt to %d devices: %d ARE IDLE", len(members), layout.mesh.size, idle)
    attention_choice(shared.model, layout)  # refuses what these devices cannot compute
    require_memory(shared.model.remat, layout)
    if layout.backend == "cpu":
        keep_freed_memory()
    return build_ensemble(
        shared.model,
        layout,
        shared.optimizer,
        [member.schedule for member in members],
        steps=shared.steps,
        token_bytes=inputs.shared.tokenizer.piece_bytes,
        sources=len(inputs.shared.data.source_names),
        heldout_sources=len(inputs.shared.heldout.sources),
        z_loss=shared.z_loss,
        ema=shared.ema,
        skip=shared.skip,
    )


def _go_on(run: _Ensemble) -> None:
    """Restores or begins, trains what is left, and measures on all text."""
    state, progress = _begun(run)
    done = int(progress["tally"]["step"])
    drop_measurements(run.folder, done)
    facts = {"members": len(run.members), "mesh": dict(run.program.layout.mesh.shape), "devices": len(jax.devices())}
    note(run.folder, "start", step=done, **facts)
    try:
        state, tally = _trained(run, state, progress, facts)
    except UserError:
        run.checkpoints.wait()
        raise
    run.checkpoints.close()
    with run.stopping.at_once():
        run.watchdog.phase("measuring on all held-out text")
        _measure(run, run.shared.steps, state.params, tally, complete=True)
    note(run.folder, "end", how="complete", diverged=tally.diverged)


def _begun(run: _Ensemble) -> tuple[TrainState, dict[str, Any]]:
    """The newest sound checkpoint's state and progress, or those before the first step."""
    if run.checkpoints.latest is not None:
        return run.checkpoints.restore(run.program.state)
    if run.checkpoints.set_aside:
        raise UserError(
            f"{run.checkpoints.folder} has no sound checkpoint left ({', '.join(run.checkpoints.set_aside)}): restore "
            "one from a backup, or move the folder away to begin anew."
        )
    keys = jnp.stack([jax.random.key(member.seed) for member in run.members])
    before = {"row": 0, "seconds": 0.0, "lap": [0.0, 0.0], "tally": Tally.before(len(run.members))}
    return run.program.init(keys), before


def _trained(
    run: _Ensemble, state: TrainState, progress: dict[str, Any], facts: dict[str, Any]
) -> tuple[TrainState, Tally]:
    """Opens what a stretch of training writes to and reads from, and trains to the last step."""
    sources = tuple(source.name for source in run.inputs.shared.heldout.sources)
    tally = Tally(run.members, sources, run.inputs.reads, progress["tally"])
    done, row = progress["tally"]["step"], progress["row"]
    if done == run.shared.steps:
        return state, tally
    sizes = run.batch_sizes.from_row(row)
    with (
        MetricsWriter(run.folder, resume_at=done, facts=facts) as writer,
        Progress(f"{len(run.members)} members", run.shared.steps, done) as bar,
        closing(run.inputs.rows.batches(sizes, run.shared.total_rows)) as batches,
    ):
        placed = ((after, run.program.place(batch)) for after, batch in batches)
        clock = Clock(progress["seconds"], tuple(progress["lap"]))
        return _loop(run, state, done, placed, sizes, _Records(run, tally, writer, bar, clock)), tally


class _Records:
    """The records of a stretch of training."""

    def __init__(self, run: _Ensemble, tally: Tally, writer: MetricsWriter, bar: Progress, clock: Clock) -> None:
        shared, used = run.shared, run.program.layout.mesh.size
        peak = peak_of(shared.model.compute, jax.devices()[0].device_kind, used)
        self._flops = flops_per_token(shared.model, shared.data.sequence_length) / peak.flops
        self.tally, self.clock, self.writer, self._bar = tally, clock, writer, bar

    def train(self, step: int) -> None:
        """Of the steps that end with `step`, if there is to be one; waits for the last of them."""
        if not self.tally.due(step):
            return
        self.tally.settle()
        seconds, waited = self.clock.lap()
        record = self.tally.record(step, seconds)
        record |= {"mfu": record["tokens_per_second"] * self._flops, "data_wait": waited / seconds}
        self.writer.write({**record, "seconds": self.clock.total})
        if record["bits_per_byte"] is not None:
            self._bar.show(record)


def _loop(
    run: _Ensemble,
    state: TrainState,
    done: int,
    batches: Iterator[tuple[int, Batch]],
    sizes: BatchSizes,
    records: _Records,
) -> TrainState:
    """To the last step. While a step is under way, the next batch is fetched and placed, and then the metrics of the
    step before are fetched."""
    shared, tally, clock = run.shared, records.tally, records.clock
    run.watchdog.phase("compiling")
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(_compiled, run, sizes, records.writer)
        coming = next(batches)  # they are read meanwhile
        train_step = compiling.result()
    before: StepMetrics | None = None
    ended = time.perf_counter()
    clock.restart()
    for step in range(done + 1, shared.steps + 1):
        run.watchdog.phase(f"step {step}")
        last = step == shared.steps
        run.stopping.ask()
        row, batch = coming
        state, metrics = train_step[batch.source.shape[1]](state, batch)
        if not last:
            with clock.waiting(metrics.loss):
                coming = next(batches)
        records.train(step - 1)
        tally.add(metrics)
        jax.block_until_ready(before)  # one step is ahead, not more: who is asked to stop is not far from the answer
        before = metrics
        run.stopping.stepped(time.perf_counter() - ended)

        wish = run.stopping.answer()
        measuring = last or step % shared.evaluate_every == 0
        saving = shared.has_permanent_checkpoint(step) or wish is not Wish.NONE
        ended = time.perf_counter()
        if not (measuring or saving):
            continue
        jax.block_until_ready(metrics)
        records.train(step)
        with clock.stopped():
            if measuring:
                run.watchdog.phase(f"measuring after step {step}")
                _measure(run, step, state.params, tally, complete=False)
            if saving:
                _saved(run, step, state, row, records)
        if wish is Wish.STOP and not last:
            run.watchdog.phase("saving")
            run.checkpoints.close()
            raise StoppedError(
                f"stopped after step {step} of {shared.steps} by {run.stopping.reason}; all is saved in {run.folder}, "
                "and the same command goes on."
            )
        ended = time.perf_counter()
    return state


def _measure(run: _Ensemble, step: int, params: Params, tally: Tally, *, complete: bool) -> None:
    rows = None if complete else run.shared.evaluate_rows
    sums = measure_members(run.program, params, run.inputs.shared.heldout, rows, alive=run.watchdog.alive)
    add_measurements(run.folder, tally.measured(step, sums, complete=complete))


def _saved(run: _Ensemble, step: int, state: TrainState, row: int, records: _Records) -> None:
    """Begins a checkpoint, of members that have diverged too: those beside them are sound."""
    run.watchdog.phase(f"saving after step {step}")
    tally = records.tally.progress()
    if not records.writer.secure():
        run.checkpoints.refuse(f"the records before it cannot be written to {run.folder}")
        return
    start = time.perf_counter()
    clock = {"seconds": records.clock.total, "lap": list(records.clock.so_far())}
    run.checkpoints.save(step, state, {"row": row, "tally": tally, **clock})
    seconds = time.perf_counter() - start
    run.stopping.saved(max(seconds, run.checkpoints.longest))
    records.writer.write({"kind": "checkpoint", "step": step, "stall_seconds": seconds})


def _compiled(
    run: _Ensemble, sizes: BatchSizes, writer: MetricsWriter
) -> dict[int, Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]]:
    """The train step for all batch sizes to come: what does not fit into memory shows now, not hours later."""
    length = run.shared.data.sequence_length
    with compile_times() as times:
        steps = {size: run.program.compile_train(size, length) for size in sizes.sizes}
    writer.write({"kind": "compiled", "step": 0, **dataclasses.asdict(times)})
    return steps
