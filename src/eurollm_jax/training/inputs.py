"""What an experiment's paths point to: opened, checked against each other, and planned, before anything is trained."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.parity import ParityReport, languages_of, parity_report
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.loader import Data, open_data
from eurollm_jax.data.plan import mixture_plan, share_steps
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import HeldOut
from eurollm_jax.experiment import Experiment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What an experiment's paths point to, opened and checked against each other."""

    tokenizer: Tokenizer
    data: Data
    heldout: HeldOut
    parity: ParityReport


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
