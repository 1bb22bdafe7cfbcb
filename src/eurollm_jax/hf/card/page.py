"""The model card of an export: README.md, written from what the run directory records and nothing else.

What is not recorded is said to be so, and never guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurollm_jax.evaluation.report.records import Run, read_run
from eurollm_jax.evaluation.report.text import count, paragraphs
from eurollm_jax.experiment import read_record
from eurollm_jax.hf.card.data import (
    Consumed,
    consumed_until,
    data_section,
    licence_section,
    mixture_section,
    read_by_language,
)
from eurollm_jax.hf.card.training import (
    compute_section,
    evaluation_section,
    limitations_section,
    provenance_section,
    recipe_section,
)
from eurollm_jax.hf.card.words import NOT_RECORDED, architecture, bullets, cell, facts, table
from eurollm_jax.languages import LANGUAGES
from eurollm_jax.model.config import MoE, TransformerConfig
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs

# Identifiers of https://huggingface.co/docs/hub/repositories-licenses; any other licence is "other", with a name.
_HUB_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    llama2 llama3 llama3.1 llama3.2 llama3.3 gemma
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())


def model_card(
    run: Path,
    config: TransformerConfig,
    *,
    name: str,
    dtype: str,
    sources_of_weights: str,
    license: str | None,
    step: int | None = None,
    base_model: str | None = None,
) -> str:
    """README.md of an export of the run directory `run`, in the form of the Hugging Face hub.

    `sources_of_weights` says which weights these are ("step 2000"), `step` up to which step of the training they have
    seen data (None: the last that is recorded), `base_model` the hub's name of the model that training or import began
    with. Raises UserError where `run` is no run directory or a file in it is malformed.
    """
    record = read_record(run)
    weights = f"{cell(sources_of_weights)}, stored in {cell(dtype)}"
    if record.get("imported"):
        sections = [
            front_matter(license, [], base_model, tags=["eurollm_jax"]),
            f"# {cell(name)}",
            f"A model of {count(parameters(config).total)} parameters that was imported from a folder in Hugging Face "
            "format and is written again. No training happened here. Its languages, data, recipe and evaluation are "
            "not recorded here: they are for its makers to describe.",
            _model(config, weights),
            USE,
            _origin(record, base_model),
            "## Limitations\n\nThose of the model that was imported. Nothing of it was measured here.",
            VERIFICATION,
            _license(license),
        ]
    else:
        read = read_run(run)
        consumed = consumed_until(read, step)
        languages = [code for code in read_by_language(read.plan, consumed) if code in LANGUAGES]
        sections = [
            front_matter(license, languages, base_model, tags=["eurollm_jax", "pretrained"]),
            f"# {cell(name)}",
            _introduction(read, config, consumed, languages),
            _model(config, weights),
            USE,
            data_section(read, consumed),
            mixture_section(read),
            recipe_section(read, consumed),
            compute_section(read, config, consumed),
            evaluation_section(read.evaluation, sources_of_weights),
            licence_section(read.plan),
            limitations_section(read, config, consumed),
            VERIFICATION,
            provenance_section(read, record),
            _license(license),
        ]
    return "\n\n".join(sections) + "\n"


def front_matter(license: str | None, languages: list[str], base_model: str | None, tags: list[str]) -> str:
    """The card's metadata as YAML; strings are written as in JSON, which YAML reads alike (a bare `no` is false)."""
    fields: dict[str, str | list[str]] = {}
    if languages:
        fields["language"] = sorted({hub_language(code) for code in languages})
    if license is not None and license.lower() in HUB_LICENSES:
        fields["license"] = license.lower()
    elif license is not None:
        fields |= {"license": "other", "license_name": license}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if base_model is not None:
        fields["base_model"] = base_model
    lines = []
    for field, value in fields.items():
        listed = [f"- {_quoted(item)}" for item in value] if isinstance(value, list) else []
        lines += [f"{field}:", *listed] if listed else [f"{field}: {_quoted(value)}"]
    return "\n".join(["---", *lines, "---"])


def hub_language(code: str) -> str:
    """The hub's code of a language of ours: ISO 639-1, or 639-3 where there is none; scripts are not told apart."""
    short = code.split("-")[0]
    return short if len(short) == 2 else LANGUAGES[code].iso639_3


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Parameters:
    total: int
    non_embedding: int  # without the embedding and the output head
    active: int  # of all, those that one token meets: fewer where it is sent to some of the experts


def parameters(config: TransformerConfig) -> Parameters:
    total = embedding = idle = 0
    for path, spec in flatten(specs(config)).items():
        total += spec.size
        embedding += spec.size if "vocab" in spec.axes else 0
        if isinstance(config.mlp, MoE) and "/experts/" in path:
            idle += spec.size - spec.size * config.mlp.top_k // config.mlp.experts
    return Parameters(total, total - embedding, total - idle)


def _introduction(run: Run, config: TransformerConfig, consumed: Consumed | None, languages: list[str]) -> str:
    read = f"how much text it has read is {NOT_RECORDED}"
    if consumed is not None:
        many = f"{len(languages)} language{'s' if len(languages) != 1 else ''}"
        read = f"in this run it has read {count(consumed.all_tokens)} tokens of text in {many}"
    kind = "language model" if run.experiment.experiment.get("start_from") else "base language model"
    said = f"A {kind} of {count(parameters(config).total)} parameters; {read}."
    question = next((words for kind, words in paragraphs(run.experiment.docstring) if kind == "p"), None)
    if question is not None:
        said += f" It was made for the experiment `{run.experiment.name}`:\n\n> {cell(question)}"
    return said


def _model(config: TransformerConfig, weights: str) -> str:
    numbers = parameters(config)
    rows = {"Parameters": f"{numbers.total:,}", "Without embedding and output head": f"{numbers.non_embedding:,}"}
    if isinstance(config.mlp, MoE):
        rows["Active for each token"] = f"{numbers.active:,}"
    return f"## Model\n\n{bullets(architecture(config))}\n\n{facts({**rows, 'Weights': weights})}"


USE = """## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="path/to/this/folder")
print(write("The", max_new_tokens=50)[0]["generated_text"])
```"""


VERIFICATION = """## Verification

`sha256sum --check SHA256SUMS` says whether these files are those that were written. Who has the run compares weights,
logits, continuations and the tokenizer's ids with `eurollm hf verify`."""


def _origin(record: Mapping[str, Any], base_model: str | None) -> str:
    """Where an imported model came from, and the hashes of the files it lay in. The folder's path stays private."""
    origin = record["imported"]
    said = origin.get("config", {})
    rows = {
        "Model": cell(base_model or said.get("_name_or_path") or NOT_RECORDED),
        "Folder": cell(Path(origin["folder"]).name),
        "Architecture": cell(origin["architecture"]),
        "Weights came in": cell(origin["dtype"]),
        "Tokenizer": "came with it" if origin["tokenizer"] else "none came with it",
        "Written by transformers": cell(said.get("transformers_version", NOT_RECORDED)),
        "Imported": cell(record["created"]),
        "Fingerprint": f"`{record['fingerprint']}`",
    }
    hashes = ((cell(file), f"`{digest}`") for file, digest in sorted(origin["sha256"].items()))
    return f"## Origin\n\n{facts(rows)}\n\n{table({'File': 'left', 'SHA-256': 'left'}, hashes)}"


def _license(license: str | None) -> str:
    said = "No licence is stated for these weights." if license is None else f"The weights: {cell(license)}."
    return f"## Licence\n\n{said}"
