"""The sections of a model card about its training: recipe, compute, evaluation, limitations, provenance."""

import json
import math
from collections.abc import Mapping
from typing import Any

from eurollm_jax.evaluation.report.records import Evaluation, Run
from eurollm_jax.evaluation.report.text import bits, count, duration, signed_percent
from eurollm_jax.hf.card.data import Consumed, read_by_language
from eurollm_jax.hf.card.words import NOT_RECORDED, bullets, call, cell, facts, language, table
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import count as count_weights
from eurollm_jax.model.transformer import flops_per_token, specs

SMALL = 10**9  # parameters below which a card calls a model small
COMPUTE_OPTIMAL = 20  # tokens for each parameter (Hoffmann et al. 2022, arXiv:2203.15556, as usually rounded)
FEW = 0.01  # share of the tokens below which a card warns of a language


def recipe_section(run: Run, consumed: Consumed | None) -> str:
    experiment: Mapping[str, Any] = run.experiment.experiment
    data: Mapping[str, Any] = experiment.get("data", {})
    length, batch, planned = data.get("sequence_length"), experiment.get("batch_size"), experiment.get("steps")
    tokens = f" ({batch * length:,} tokens)" if batch and length else ""
    ramp = "".join(f"; {rows:,} rows from row {start:,} on" for start, rows in experiment.get("batch_ramp") or ())
    done = NOT_RECORDED if consumed is None else f"{consumed.step:,}"
    rows = {
        "Optimizer": _call(experiment.get("optimizer")),
        "Learning rate": _call(experiment.get("schedule")),
        "Batch": f"{batch:,} rows{tokens}{ramp}" if batch else NOT_RECORDED,
        "Sequence length": f"{length:,} tokens" if length else NOT_RECORDED,
        "Steps": done if planned is None else f"{done} of {planned:,} planned",
        "Precision": f"products in {_known(experiment.get('model', {}).get('compute'))}, parameters in float32",
        "Packing": _known(data.get("packing")),
        "z-loss": _known(experiment.get("z_loss")),
        "Seeds": f"{_known(experiment.get('seed'))} (weights), {_known(data.get('seed'))} (order of the data)",
    }
    if experiment.get("start_from"):
        rows["Seeds"] = f"{_known(data.get('seed'))} (order of the data)"
    if experiment.get("ema") is not None:
        rows["Moving average of the parameters"] = f"kept beside them, decay {cell(experiment['ema'])} at each step"
    return f"## Training\n\n{facts(rows)}"


def _known(value: object) -> str:
    return NOT_RECORDED if value is None else cell(value)


def _call(described: object) -> str:
    return NOT_RECORDED if described is None else f"`{call(described)}`"


def compute_section(run: Run, config: TransformerConfig, consumed: Consumed | None) -> str:
    title, length = "### Compute", run.experiment.experiment.get("data", {}).get("sequence_length")
    if consumed is None or not length:
        return f"{title}\n\nFLOPs, time and energy are {NOT_RECORDED}."
    each = flops_per_token(config, length)
    restarts = _restarts(run)
    rows = {
        "Training FLOPs": f"{each * consumed.all_tokens:.3g} ({each:.4g} for each token)",
        "Devices": cell(_one_after_another(run.experiment.devices, [r.get("devices") for r in restarts])),
        "Time in training steps": duration(consumed.seconds),
        "Restarts": f"{len(restarts):,}",
        "Energy and emissions": "not measured",
    }
    method = (
        "FLOPs are counted, not measured: 6 for each matrix weight that a token meets (the output head is one, the "
        f"embedding is not) and 12 for each layer, head dimension and key seen in rows of {length:,} tokens, forward "
        "and backward, times the tokens above. Recomputation and padding are not counted. Evaluation and checkpoints "
        "are not in the time."
    )
    return f"{title}\n\n{facts(rows)}\n\n{method}"


def _restarts(run: Run) -> list[dict[str, Any]]:
    """The records of restarts with all that they say; `read_run` has checked the file."""
    path = run.path / "metrics.jsonl"
    if run.metrics is None or not run.metrics.restarts:
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = [line for number, line in enumerate(lines, 1) if number != run.metrics.cut_line]
    records = (json.loads(line) for line in whole if '"restart"' in line)
    return [record for record in records if record["kind"] == "restart"]


def _one_after_another(first: str, later: list[str | None]) -> str:
    return "; then ".join(dict.fromkeys([first, *(value for value in later if value)]))


def evaluation_section(evaluation: Evaluation | None, sources_of_weights: str) -> str:
    title = "## Evaluation"
    if evaluation is None:
        return f"{title}\n\nThe model was not evaluated on held-out text."
    rows = (
        (
            f"{cell(result.name)} ({cell(code)})",
            f"{result.bytes:,}",
            f"**{bits(result.bits_per_byte)}**",
            bits(result.baselines.xz),
            bits(result.baselines.order0),
            signed_percent(result.gain),
        )
        for code, result in sorted(evaluation.languages.items(), key=lambda item: item[1].name)
    )
    columns = {"Language": "left", "Held-out bytes": "right", "Bits per byte": "right", "xz": "right"}
    won = evaluation.beats_xz
    same = sources_of_weights == f"step {evaluation.step}"
    which = "which are these" if same else f"and not with these, which are: {cell(sources_of_weights)}"
    return "\n\n".join(
        [
            title,
            f"On held-out text, with the parameters after step {evaluation.step:,} in the precision of training, "
            f"{which}. Mean over the languages: {bits(evaluation.macro)} bits per "
            f"byte; fewer is better. The model needs fewer bits than `xz` in {won.all} of {won.all_total} languages.",
            table({**columns, "Order 0": "right", "Saved against xz": "right"}, rows),
            f"{evaluation.definition} Compare a language with its own baselines and not with another language: a "
            "letter takes one to three bytes, depending on the script.",
            "No benchmark of tasks was run.",
        ]
    )


def limitations_section(run: Run, config: TransformerConfig, consumed: Consumed | None) -> str:
    total = count_weights(specs(config))
    began = run.experiment.experiment.get("start_from")
    lines = [
        "Trained here to continue text, and nothing filters what it writes. What the parameters that it began with had "
        "been trained to do, such as to follow instructions, may have been lost."
        if began
        else "A base model: it continues text. It was not trained to follow instructions, to converse, to decline or "
        "to tell the truth, and nothing filters what it writes."
    ]
    if total < SMALL:
        lines.append(f"Small: with {count(total)} parameters it is for research, and no source of facts.")
    if consumed is not None:
        tokens = consumed.all_tokens
        if tokens < COMPUTE_OPTIMAL * total and not began:
            lines.append(
                f"Trained briefly: {tokens / total:.2g} tokens for each parameter, where about {COMPUTE_OPTIMAL} make "
                "the best of a training budget (Hoffmann et al. 2022, arXiv:2203.15556)."
            )
        read = read_by_language(run.plan, consumed).items()
        if few := [language(code) for code, of_language in read if of_language.tokens < FEW * tokens]:
            lines.append(f"Of these languages it has read little, less than {FEW:.0%} of all: {', '.join(few)}.")
    results = run.evaluation.languages.values() if run.evaluation else ()
    if lost := sorted(cell(r.name) for r in results if not (math.isfinite(r.gain) and r.gain > 0)):
        lines.append(f"It predicts held-out text no better than `xz` compresses it in: {', '.join(lost)}.")
    lines.append(
        "Not examined: bias, harmful content, memorised or personal text, and whether texts of benchmarks are in the "
        "training data."
    )
    return f"## Limitations\n\n{bullets(lines)}"


def provenance_section(run: Run, record: Mapping[str, Any]) -> str:
    experiment, restarts = run.experiment, _restarts(run)
    hashes = record["identity"].get("inputs", {})
    names = {"store": "training data", "heldout": "held-out data", "tokenizer": "tokenizer"}
    names["start"] = "checkpoint that it began with"
    code = _one_after_another(experiment.code or "", [restart.get("code") for restart in restarts])
    versions = [_versions(restart["versions"]) for restart in restarts if "versions" in restart]
    rows = {
        "Experiment": cell(experiment.name),
        "Begun": cell(experiment.created),
        "Fingerprint of the experiment": f"`{experiment.fingerprint}`",
        **{f"Fingerprint of the {names.get(key, cell(key))}": f"`{digest}`" for key, digest in hashes.items()},
        "Commit of the code": cell(code.removeprefix("; then ")) or NOT_RECORDED,
        "Versions": cell(_one_after_another(_versions(experiment.versions), [*versions])),
    }
    return f"## Provenance\n\n{facts(rows)}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
