"""The loop: opens what an experiment names, restores or begins, trains to the last step, and leaves a run directory.

What is trained is a function of the experiment and the row number alone, so a run that was stopped anywhere goes on as
if it had not been.
"""

import dataclasses
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
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.parity import ParityReport, languages_of, parity_report
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import Data, open_data
from eurollm_jax.data.plan import mixture_plan, share_steps
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import HeldOut, Measure, build_measure, evaluation, measure_heldout
from eurollm_jax.evaluation.samples import sample
from eurollm_jax.experiment import Experiment, claim_run, environment, locked
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.param import Params, count, flatten
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import flops_per_token, specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.parallel.programs import CompileTimes, compile_times
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.metrics import MFU, Clock, MetricsWriter, Peak, peak_of
from eurollm_jax.training.progress import Progress
from eurollm_jax.training.recorder import Recorder
from eurollm_jax.training.start import branched_state, first_state, hash_of_start, require_branch
from eurollm_jax.training.step import Program, StepMetrics, TrainState, build_program
from eurollm_jax.training.trace import Trace, Tracer

log = logging.getLogger(__name__)

type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True)
class Inputs:
    """What an experiment's paths point to, opened and checked against each other."""

    tokenizer: Tokenizer
    data: Data
    heldout: HeldOut
    parity: ParityReport


@dataclass(frozen=True)
class Run:
    """What stays the same from a run's first step to its last."""

    experiment: Experiment
    inputs: Inputs
    layout: Layout
    program: Program
    measure: Measure
    folder: Path

    @property
    def batch_sizes(self) -> BatchSizes:
        """Those that the run reaches."""
        return self.experiment.batch_sizes.until(self.experiment.total_rows)


def open_inputs(experiment: Experiment) -> Inputs:
    """Raises UserError where something is missing, two things do not belong together, or a language is served badly."""
    tokenizer = Tokenizer.load(Path(experiment.tokenizer))
    data = open_data(experiment.data, experiment.total_rows)
    heldout = TokenStore.open(Path(experiment.heldout))
    for store in (*data.stores, heldout):
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{store.path} was prepared with another tokenizer than {experiment.tokenizer}: prepare it again."
            )
    if spare := tokenizer.spare_rows(experiment.model.vocab_size):
        log.warning("the model's vocabulary has %d rows that no token of the tokenizer uses", spare)
    shares = {planned.name: planned.share for planned in data.plan(experiment.total_rows)}
    parity = parity_report(experiment.parity, data.sources, shares)
    parity.require()
    if parity.allowed:
        log.warning("BEYOND THE LIMITS OF PARITY, and allowed by the experiment: %s", languages_of(parity.allowed))
    return Inputs(
        tokenizer,
        data,
        HeldOut(heldout, experiment.data.sequence_length, experiment.batch_size // experiment.accumulate),
        parity,
    )


def plan(experiment: Experiment, data: Data) -> dict[str, Any]:
    """What the run will read of each source, before anything is trained."""
    sources = {}
    for planned in mixture_plan(experiment.data.mixture, data.sizes, experiment.total_rows).total:
        source = data.sources[planned.name]
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
        "stages": share_steps(data.schedule),
        "removed": [removed.describe() for removed in data.removed],
        "sources": sources,
    }


def train(experiment: Experiment, docstring: str, *, trace: Trace | None = None, began: float | None = None) -> Path:
    """Trains to the experiment's last step, going on from where its run directory stands; returns that directory.

    The profile of a `trace` is written there. `began` is when the start of the program began, of time.perf_counter():
    from then until the first step is done is recorded.
    """
    began = time.perf_counter() if began is None else began
    if trace is not None:
        trace.require_within(0, experiment.steps)
    inputs = open_inputs(experiment)
    layout = Layout(experiment.mesh.build())
    attention_choice(experiment.model, layout)  # refuses what these devices cannot compute
    require_memory(experiment.model.remat, layout)
    if layout.backend == "cpu":
        keep_freed_memory()
    weights = specs(experiment.model)
    program = build_program(
        experiment.model,
        layout,
        experiment.optimizer.build(experiment.schedule.build(experiment.steps), weights),
        batch_sizes=experiment.batch_sizes.until(experiment.total_rows).sizes,
        token_bytes=inputs.tokenizer.piece_bytes,
        sources=len(inputs.data.source_names),
        z_loss=experiment.z_loss,
        ema=experiment.ema,
        length=experiment.data.sequence_length,
        accumulate=experiment.accumulate,
        skip=experiment.skip,
    )
    measure = build_measure(experiment.model, layout, inputs.tokenizer.piece_bytes, len(inputs.heldout.languages))
    hashes = {
        "tokenizer": inputs.tokenizer.sha256,
        "store": inputs.data.fingerprint,
        "heldout": inputs.heldout.store.fingerprint,
        **hash_of_start(experiment),
    }
    require_branch(experiment, hashes)
    embedding = sum(spec.size for spec in flatten(weights).values() if "vocab" in spec.axes)
    facts = {"parameters": count(weights), "parameters_non_embedding": count(weights) - embedding}
    folder = claim_run(experiment, docstring, hashes, facts)
    with locked(folder):
        _go_on(Run(experiment, inputs, layout, program, measure, folder), trace, began)
    return folder


def _go_on(run: Run, trace: Trace | None, began: float) -> None:
    """Restores or begins, trains what is left, and evaluates."""
    experiment, data = run.experiment, run.inputs.data
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=experiment.keep_checkpoints)
    resume_at = checkpoints.latest
    progress: dict[str, Any] = {"row": 0, "seconds": 0.0, "tokens": [0] * len(data.source_names)}
    if resume_at is not None:
        state, progress = checkpoints.restore(run.program.state)
    elif experiment.branch_from is not None:
        state, progress = branched_state(experiment, run.program)
        resume_at = int(state.step)
    else:
        state = first_state(experiment, run.program, run.layout)
    if trace is not None:
        trace.require_within(resume_at or 0, experiment.steps)
    if "data" in progress:
        data.require_same(progress["data"], progress["row"])
    if resume_at == experiment.steps:
        log.info("%s is complete: all %d steps are trained", run.folder, experiment.steps)
    else:
        write_json(run.folder / "plan.json", plan(experiment, data) | {"parity": run.inputs.parity.describe()})
        run.inputs.tokenizer.save(run.folder / "tokenizer")  # so that the model can be used when the original has moved
        for outdated in ("evaluation.json", "samples.json", "report.html"):
            (run.folder / outdated).unlink(missing_ok=True)
        clock = Clock(progress["seconds"])
        peak = peak_of(experiment.model.compute, jax.devices()[0].device_kind, jax.device_count())
        facts = _facts(run, peak)
        log.info("%s", _in_words(run, facts))
        with (
            MetricsWriter(run.folder, resume_at=resume_at or 0, facts=facts) as writer,
            Progress(experiment.name, experiment.steps, resume_at or 0) as bar,
            closing(data.loader(progress["row"], run.batch_sizes, stop_row=experiment.total_rows)) as batches,
            closing(Tracer(trace, run.folder / "trace", clock)) as tracer,
        ):
            recorder = Recorder(experiment, data, writer, bar, clock, progress["tokens"], peak)
            state = _loop(run, state, progress["row"], batches, checkpoints, recorder, tracer, began)
    checkpoints.close()
    _conclude(run, state.params)


def _facts(run: Run, peak: Peak) -> dict[str, Any]:
    """What may be another at each start of a run, beside its plan."""
    experiment = run.experiment
    return {
        **environment(),
        "stores": list(experiment.data.stores),
        "workers": experiment.data.workers,
        "removed": [removed.describe() for removed in run.inputs.data.removed],
        "parity_allowed": run.inputs.parity.describe()["allowed_beyond"],
        "mesh": {axis: size for axis, size in run.layout.mesh.shape.items() if size > 1},
        "compute": experiment.model.compute,
        "remat": experiment.model.remat,
        "accumulate": experiment.accumulate,
        "attention": dict(zip(("kernel", "why"), attention_choice(experiment.model, run.layout), strict=True)),
        "flops_per_token": flops_per_token(experiment.model, experiment.data.sequence_length),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "mfu_formula": MFU,
    }


def _in_words(run: Run, facts: Mapping[str, Any]) -> str:
    """How a run is computed, in one line."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items()) or "one device"
    kept = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    attention = facts["attention"]
    return (
        f"{facts['devices']}, {mesh}; {count(specs(run.experiment.model)):,} parameters, "
        f"{type(run.experiment.optimizer).__name__}, products in {facts['compute']}, remat {facts['remat']}, "
        f"attention {attention['kernel']} ({attention['why']}); "
        f"{facts['flops_per_token']:.3g} FLOP a token, peak {facts['peak_flops'] / 1e12:.3g} TFLOP/s "
        f"({facts['peak_source']}); programs are {f'kept in {kept}' if kept else 'not kept'}"
    )


def _loop(
    run: Run,
    state: TrainState,
    row: int,
    batches: Iterator[tuple[int, Batch]],
    checkpoints: Checkpoints,
    recorder: Recorder,
    tracer: Tracer,
    began: float,
) -> TrainState:
    """From global row `row` to the last. While a step is under way, the next batch is fetched and placed, and then the
    metrics of the step before are fetched."""
    experiment, data, heldout = run.experiment, run.inputs.data, run.inputs.heldout
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(_compiled, run, row)
        coming = _placed(next(batches), run.layout)  # the loader starts meanwhile
        train_step, compile_time = compiling.result()
    interval: list[StepMetrics] = []
    first = run.batch_sizes.step_of_row(row) + 1
    recorder.clock.restart()
    for step in range(first, experiment.steps + 1):
        row, batch = coming
        tracer.before(step, state)
        state, metrics = train_step[len(batch.source)](state, batch)
        if step < experiment.steps:
            with recorder.clock.waiting(metrics.loss):
                coming = _placed(next(batches), run.layout)
        tracer.after(step, metrics)
        if step == first:
            jax.block_until_ready(metrics)
            recorder.first_step(step, time.perf_counter() - began, compile_time)
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
                start = time.perf_counter()
                sums = measure_heldout(run.measure, state.params, heldout, run.layout, experiment.evaluate_rows)
                recorder.heldout(step, tuple(heldout.languages), sums, time.perf_counter() - start)
            if saving:
                start = time.perf_counter()
                checkpoints.save(step, state, {"row": row, "data": data.describe(), **recorder.progress()})
                recorder.checkpoint(step, time.perf_counter() - start)
    return state


def _compiled(run: Run, row: int) -> tuple[dict[int, TrainStep], CompileTimes]:
    """The train step for all batch sizes from `row` on: what does not fit into memory shows now, not weeks later."""
    length = run.experiment.data.sequence_length
    with compile_times() as times:
        steps = {size: run.program.compile_train(size, length) for size in run.batch_sizes.from_row(row).sizes}
    return steps, times


def _placed(item: tuple[int, Batch], layout: Layout) -> tuple[int, Batch]:
    row, batch = item
    return row, layout.place_rows(batch)


def _conclude(run: Run, params: Params) -> None:
    """The full evaluation and the samples of a trained run, unless they are there."""
    heldout, tokenizer = run.inputs.heldout, run.inputs.tokenizer
    if not (run.folder / "evaluation.json").exists():
        sums = measure_heldout(run.measure, params, heldout, run.layout)
        write_json(run.folder / "evaluation.json", evaluation(heldout, sums, tokenizer, run.experiment.steps))
    if not (run.folder / "samples.json").exists():
        sources = [max(found, key=lambda source: source.bytes) for found in heldout.languages.values()]
        samples = sample(params, run.experiment.model, run.layout, tokenizer, sources)
        write_json(run.folder / "samples.json", samples)
