"""A run from its start to its end: opened, claimed, restored or begun, trained, and evaluated.

What is trained is a function of the experiment and the row number alone, so a run that was stopped anywhere goes on as
if it had not been. Several processes run the same code in lockstep; the first one writes. The steps themselves are in
loop.py.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.evaluation.perplexity import build_measure, evaluation, measure_heldout
from eurollm_jax.evaluation.samples import sample
from eurollm_jax.experiment import Experiment, claim_run, environment, identity, refresh_record, source_hash
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.param import Params, count, flatten
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.distributed import any_process, is_first, require_same
from eurollm_jax.parallel.liveness import RollCall
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.training.amend import amend
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.description import facts_of
from eurollm_jax.training.history import logged, note
from eurollm_jax.training.inputs import Inputs, open_inputs
from eurollm_jax.training.lock import locked
from eurollm_jax.training.loop import Begun, Run, trained
from eurollm_jax.training.metrics import peak_of
from eurollm_jax.training.replicas import ReplicaCheck
from eurollm_jax.training.rollback import going_on, recorded_rollbacks, roll_back
from eurollm_jax.training.skipping import DivergedError
from eurollm_jax.training.start import branched_state, first_state, hash_of_start, require_branch
from eurollm_jax.training.step import Program, TrainState, build_program
from eurollm_jax.training.stopping import Stopping
from eurollm_jax.training.trace import Trace
from eurollm_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    docstring: str,
    *,
    trace: Trace | None = None,
    began: float | None = None,
    time_limit: float | None = None,
    accept_changes: bool = False,
) -> Path:
    """Trains to the experiment's last step, going on from where its run directory stands; returns that directory.

    The profile of a `trace` is written there. `began` is when the start of the program began, of time.perf_counter():
    from then until the first step is done is recorded, and before `time_limit` seconds are over all is saved and ended.
    With `accept_changes` a run goes on whose experiment has changed in what is still to come. Raises StoppedError at
    the limit and where a signal asks for it, and UserError for what the user can mend. Every process of a run calls
    this, and an error in one of them ends them all.
    """
    began = time.perf_counter() if began is None else began
    if trace is not None:
        trace.require_within(0, experiment.steps)
    with RollCall() as roll, Watchdog(experiment.watch, roll) as watchdog:
        watchdog.phase("opening inputs")
        inputs = open_inputs(experiment)
        layout = Layout(experiment.mesh.build())
        attention_choice(experiment.model, layout)  # refuses what these devices cannot compute
        require_memory(experiment.model.remat, layout)
        if layout.backend == "cpu":
            keep_freed_memory()
        program = _program(experiment, inputs, layout)
        measure = build_measure(experiment.model, layout, inputs.tokenizer.piece_bytes, len(inputs.heldout.languages))
        hashes = {
            "tokenizer": inputs.tokenizer.sha256,
            "store": inputs.data.fingerprint,
            "heldout": inputs.heldout.store.fingerprint,
            **hash_of_start(experiment),
        }
        watchdog.phase("claiming the run directory")
        folder = _claimed(experiment, docstring, hashes, accept_changes=accept_changes)
        with (
            locked(folder),
            logged(folder),
            Stopping(layout, time_limit=time_limit, began=began, save_minutes=experiment.saving.minutes) as stopping,
        ):
            watchdog.keep(folder)
            replicas = ReplicaCheck(program.state)
            run = Run(
                experiment, inputs, layout, program, measure, folder, hashes, replicas, stopping, watchdog, trace, began
            )
            roll.on_end = lambda line: note(folder, "end", how=line)  # where an error or a loss ends several processes
            try:
                _go_on(run)
            except BaseException as error:
                if jax.process_count() == 1 or isinstance(error, StoppedError):
                    with suppress(OSError):  # which would take the place of the error
                        note(folder, "end", how=f"{type(error).__name__}: {error}")
                raise
    return folder


def _program(experiment: Experiment, inputs: Inputs, layout: Layout) -> Program:
    return build_program(
        experiment.model,
        layout,
        experiment.optimizer.build(experiment.schedule.build(experiment.steps), specs(experiment.model)),
        batch_sizes=experiment.batch_sizes.until(experiment.total_rows).sizes,
        token_bytes=inputs.tokenizer.piece_bytes,
        sources=len(inputs.data.source_names),
        z_loss=experiment.z_loss,
        ema=experiment.ema,
        length=experiment.data.sequence_length,
        accumulate=experiment.accumulate,
        skip=experiment.skip,
    )


def _claimed(experiment: Experiment, docstring: str, hashes: Mapping[str, str], *, accept_changes: bool) -> Path:
    """The run directory, made or recognised; UserError where it is another experiment's, or processes differ."""
    require_same("the experiment", identity(experiment, hashes))
    require_same("the software", {"versions": environment()["versions"], "source": source_hash()})
    if is_first():
        require_branch(experiment, hashes)
        weights = specs(experiment.model)
        embedding = sum(spec.size for spec in flatten(weights).values() if "vocab" in spec.axes)
        facts = {"parameters": count(weights), "parameters_non_embedding": count(weights) - embedding}
        claim_run(experiment, docstring, hashes, facts, accept_changes=accept_changes)
    any_process(False)  # the others go on when the directory is there
    return experiment.run


def _go_on(run: Run) -> None:
    """Restores or begins, trains what is left, and evaluates. A run that diverges goes back, and on with other rows."""
    experiment, data = run.experiment, run.inputs.data
    peak = peak_of(experiment.model.compute, jax.devices()[0].device_kind, jax.device_count())
    facts = facts_of(experiment, run.inputs, run.layout, run.replicas, peak)
    rollbacks = recorded_rollbacks(run.folder)
    while True:
        run.watchdog.phase("restoring")
        checkpoints = Checkpoints(
            run.folder / "checkpoints",
            saving=experiment.saving,
            permanent=experiment.has_permanent_checkpoint,
            decay_begins=experiment.decay_begins,
            alive=run.watchdog.alive,
        )
        state, progress = _begun(run, checkpoints)
        rollbacks = going_on(rollbacks, progress, run.folder)
        begun = Begun(int(state.step), progress, checkpoints, rollbacks)
        if run.trace is not None:
            run.trace.require_within(begun.step, experiment.steps)
        amend(experiment, run.hashes, data, begun.step, progress, rollbacks.jumps)
        if "data" in progress:
            data.require_same(progress["data"], rollbacks.jumps.data_row(progress["row"]))
        if begun.step == experiment.steps:
            log.info("%s is complete: all %d steps are trained", run.folder, experiment.steps)
            break
        if is_first():
            refresh_record(experiment)
        note(run.folder, "start", step=begun.step, **facts)
        try:
            state = trained(run, state, begun, facts, peak)
            break
        except DivergedError as error:
            checkpoints.wait()
            if experiment.rollback is None:
                raise
            diverged = error.with_traceback(None)  # which would keep the state
        except UserError:
            if jax.process_count() == 1:
                checkpoints.wait()  # of several processes the others may never get there
            raise
        run.watchdog.phase("going back")
        back = checkpoints.newest_permanent(diverged.first_step)
        rollbacks = rollbacks.then(experiment.rollback, diverged, back, experiment.batch_sizes)
        roll_back(run.folder, rollbacks)
        rollbacks = recorded_rollbacks(run.folder)  # as the first process chose
    checkpoints.close()
    with run.stopping.at_once():
        _conclude(run, state.params)
    if begun.step < experiment.steps:
        note(run.folder, "end", how="complete")


def _begun(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """The newest sound checkpoint's state and progress, or those before the first step."""
    experiment = run.experiment
    if checkpoints.latest is not None:
        return checkpoints.restore(run.program.state)
    if checkpoints.set_aside:
        raise UserError(
            f"{checkpoints.folder} has no sound checkpoint left ({', '.join(checkpoints.set_aside)}): restore one "
            "from a backup, or move the run directory away to begin anew."
        )
    if experiment.branch_from is not None:
        return branched_state(experiment, run.program)
    before = {"row": 0, "seconds": 0.0, "tokens": [0] * len(run.inputs.data.source_names)}
    return first_state(experiment, run.program, run.layout), before


def _conclude(run: Run, params: Params) -> None:
    """The full evaluation and the samples of a trained run, unless they are there."""
    heldout, tokenizer = run.inputs.heldout, run.inputs.tokenizer
    if _lacks(run.folder / "evaluation.json"):
        run.watchdog.phase("evaluating at the end")
        sums = measure_heldout(run.measure, params, heldout, run.layout, alive=run.watchdog.alive)
        if is_first():
            write_json(run.folder / "evaluation.json", evaluation(heldout, sums, tokenizer, run.experiment.steps))
    if _lacks(run.folder / "samples.json"):
        run.watchdog.phase("writing samples")
        sources = [max(found, key=lambda source: source.bytes) for found in heldout.languages.values()]
        samples = sample(params, run.experiment.model, run.layout, tokenizer, sources)
        if is_first():
            write_json(run.folder / "samples.json", samples)


def _lacks(path: Path) -> bool:
    """As the first process sees it."""
    return any_process(is_first() and not path.exists())
