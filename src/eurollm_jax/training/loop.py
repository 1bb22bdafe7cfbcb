"""The loop: opens what an experiment names, restores or begins, trains to the last step, and leaves a run directory.

What is trained is a function of the experiment and the row number alone, so a run that was stopped anywhere goes on as
if it had not been.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizer import Tokenizer
from eurollm_jax.data.loader import Data, open_data
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import HeldOut, Measure, build_measure, evaluation, measure_heldout
from eurollm_jax.evaluation.samples import sample
from eurollm_jax.experiment import Experiment, claim_run, environment, locked
from eurollm_jax.model.param import Params, count, flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.metrics import Clock, MetricsWriter
from eurollm_jax.training.progress import Progress
from eurollm_jax.training.recorder import Recorder
from eurollm_jax.training.step import Program, StepMetrics, TrainState, build_program

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What an experiment's paths point to, opened and checked against each other."""

    tokenizer: Tokenizer
    data: Data
    heldout: HeldOut


def open_inputs(experiment: Experiment) -> Inputs:
    """Raises UserError where something is missing, or two things do not belong together."""
    tokenizer = Tokenizer.load(Path(experiment.tokenizer))
    data = open_data(experiment.data, experiment.total_rows)
    heldout = TokenStore.open(Path(experiment.heldout))
    for store in (data.store, heldout):
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{store.path} was prepared with another tokenizer than {experiment.tokenizer}: prepare it again."
            )
    if tokenizer.vocab_size != experiment.model.vocab_size:
        raise UserError(
            f"the model's vocab_size={experiment.model.vocab_size} is not the tokenizer's {tokenizer.vocab_size}: "
            "change the model, or train another tokenizer."
        )
    return Inputs(tokenizer, data, HeldOut(heldout, experiment.data.sequence_length, experiment.batch_size))


def plan(experiment: Experiment, data: Data) -> dict[str, Any]:
    """What the run will read of each source, before anything is trained."""
    sources = {}
    for planned in data.plan(experiment.total_rows):
        source = data.store.sources[planned.name]
        sources[planned.name] = {
            "language": source.language,
            **{name: value for name, value in dataclasses.asdict(planned).items() if name != "name"},
            "store_tokens": source.tokens,
            "store_bytes": source.bytes,
            "store_documents": source.documents,
            "licences": {licence: size["bytes"] for licence, size in source.licences.items()},
        }
    return {
        "total_rows": experiment.total_rows,
        "sequence_length": experiment.data.sequence_length,
        "sources": sources,
    }


def train(experiment: Experiment, docstring: str) -> Path:
    """Trains to the experiment's last step, going on from where its run directory stands; returns that directory."""
    inputs = open_inputs(experiment)
    layout = Layout(experiment.mesh.build())
    if layout.platform == "cpu":
        keep_freed_memory()
    weights = specs(experiment.model)
    program = build_program(
        experiment.model,
        layout,
        experiment.optimizer.build(experiment.schedule.build(experiment.steps), weights),
        batch_size=experiment.batch_size,
        token_bytes=inputs.tokenizer.piece_bytes,
        sources=len(inputs.data.source_names),
        z_loss=experiment.z_loss,
    )
    hashes = {
        "tokenizer": inputs.tokenizer.sha256,
        "store": inputs.data.store.fingerprint,
        "heldout": inputs.heldout.store.fingerprint,
    }
    embedding = sum(spec.size for spec in flatten(weights).values() if "vocab" in spec.axes)
    facts = {"parameters": count(weights), "parameters_non_embedding": count(weights) - embedding}
    run = claim_run(experiment, docstring, hashes, facts)
    write_json(run / "plan.json", plan(experiment, inputs.data))
    _keep_tokenizer(inputs.tokenizer, run / "tokenizer")
    with locked(run):
        _go_on(experiment, inputs, layout, program, run)
    return run


def _go_on(experiment: Experiment, inputs: Inputs, layout: Layout, program: Program, run: Path) -> None:
    """Restores or begins, trains what is left, and evaluates."""
    checkpoints = Checkpoints(run / "checkpoints", keep=experiment.keep_checkpoints)
    resume_at = checkpoints.latest
    if resume_at is None:
        state = program.init(jax.random.key(experiment.seed))
        progress: dict[str, Any] = {"row": 0, "seconds": 0.0, "tokens": [0] * len(inputs.data.source_names)}
    else:
        state, progress = checkpoints.restore(program.state)
        inputs.data.require_same(progress["data"])
    measure = build_measure(experiment.model, layout, inputs.tokenizer.piece_bytes, len(inputs.heldout.store.sources))
    if resume_at == experiment.steps:
        log.info("%s is complete: all %d steps are trained", run, experiment.steps)
    else:
        for outdated in ("evaluation.json", "samples.json", "report.html"):
            (run / outdated).unlink(missing_ok=True)
        with (
            MetricsWriter(run, resume_at=resume_at or 0, facts=environment()) as writer,
            Progress(experiment.name, experiment.steps, resume_at or 0) as bar,
        ):
            recorder = Recorder(experiment, inputs.data, writer, bar, Clock(progress["seconds"]), progress["tokens"])
            state = _loop(experiment, inputs, layout, program, state, progress["row"], measure, checkpoints, recorder)
    checkpoints.close()
    _conclude(experiment, inputs, layout, measure, state.params, run)


def _loop(
    experiment: Experiment,
    inputs: Inputs,
    layout: Layout,
    program: Program,
    state: TrainState,
    row: int,
    measure: Measure,
    checkpoints: Checkpoints,
    recorder: Recorder,
) -> TrainState:
    """From global row `row` to the last. The metrics of a step are fetched once the next one is under way."""
    train_step = program.compile_train(experiment.batch_size, experiment.data.sequence_length)
    batches = inputs.data.loader(row, experiment.batch_size, stop_row=experiment.total_rows)
    interval: list[StepMetrics] = []
    recorder.clock.restart()
    for step in range(row // experiment.batch_size + 1, experiment.steps + 1):
        with recorder.clock.waiting():
            row, batch = next(batches)
        state, metrics = train_step(state, layout.place_rows(batch))
        if len(interval) == experiment.log_every:
            recorder.train(step - 1, interval)
            interval = []
        interval.append(metrics)

        last = step == experiment.steps
        saving = last or step % experiment.checkpoint_every == 0
        if saving:
            recorder.train(step, interval)
            interval = []
        evaluating = last or step % experiment.evaluate_every == 0
        if evaluating or saving:
            jax.block_until_ready(metrics)
        with recorder.clock.stopped():
            if evaluating:
                sums = measure_heldout(measure, state.params, inputs.heldout, layout, experiment.evaluate_rows)
                recorder.heldout(step, inputs.heldout.names, sums)
            if saving:
                checkpoints.save(step, state, {"row": row, "data": inputs.data.describe(), **recorder.progress()})
    return state


def _conclude(
    experiment: Experiment, inputs: Inputs, layout: Layout, measure: Measure, params: Params, run: Path
) -> None:
    """The full evaluation and the samples of a trained run, unless they are there."""
    if not (run / "evaluation.json").exists():
        sums = measure_heldout(measure, params, inputs.heldout, layout)
        write_json(run / "evaluation.json", evaluation(inputs.heldout, sums, inputs.tokenizer, experiment.steps))
    if not (run / "samples.json").exists():
        sources = list(inputs.heldout.store.sources.values())
        write_json(run / "samples.json", sample(params, experiment.model, layout, inputs.tokenizer, sources))


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """A copy in the run, so that its model can be used when the original has moved."""
    folder.mkdir(exist_ok=True)
    partial = folder / ".partial"
    partial.write_bytes(tokenizer.model)
    partial.replace(folder / tokenizer.model_path.name)
