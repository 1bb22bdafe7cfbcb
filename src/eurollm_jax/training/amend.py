"""Amending: another schedule, length, batch size or mixture for the part of a run that is still to come.

A run is amended only where the new experiment, trained from the first row, would have come to the same checkpoint. So
what is learnt stays a function of the experiment alone, whenever it was changed.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.jumps import Jumps
from eurollm_jax.data.loader import Data, differences
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode, fingerprint, identity, read_record
from eurollm_jax.parallel.distributed import is_first
from eurollm_jax.training.start import first_other_rate, keeping_rates

log = logging.getLogger(__name__)


def amend(
    experiment: Experiment,
    inputs: Mapping[str, str],
    data: Data,
    step: int,
    progress: Mapping[str, Any],
    jumps: Jumps,
) -> None:
    """Enters into the record of a claimed run what its experiment has changed; nothing where that is nothing.

    `inputs` are the hashes of what the experiment's paths point to, `step` and `progress` those of the checkpoint that
    the run goes on from (step 0: none), `jumps` what it has left out. Raises UserError that names what the experiment
    would have done otherwise before that. All processes call this, and the first one writes.
    """
    run = experiment.run
    record, mine = read_record(run), identity(experiment, inputs)
    changed = differences(record["identity"], mine)
    if not changed:
        return
    row = progress["row"]
    if step:
        _require_past(experiment, record, data, step, progress, jumps.data_row(row))
    if not is_first():
        return
    log.warning("THE EXPERIMENT CHANGES behind step %d, row %d: %s", step, row, "; ".join(changed))
    change = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "row": row,
        "changed": changed,
        "before": record["experiment"],
    }
    write_json(
        run / "experiment.json",
        {
            **record,
            "fingerprint": fingerprint(mine),
            "experiment": encode(experiment),
            "identity": mine,
            "changes": [*record.get("changes", ()), change],
        },
    )


def _require_past(
    experiment: Experiment, record: Mapping[str, Any], data: Data, step: int, progress: Mapping[str, Any], data_row: int
) -> None:
    """Raises UserError where one of the first `step` steps would have been another."""
    run, row, of_run = experiment.run, progress["row"], record["identity"]
    if experiment.steps < step:
        raise UserError(f"{run} has {step} steps behind it: set steps to {step} or more, not {experiment.steps}.")
    sizes = BatchSizes(of_run["batch_size"], tuple((start, size) for start, size in of_run["batch_ramp"])).until(row)
    if experiment.batch_sizes.until(row) != sizes:
        wanted = experiment.batch_sizes.size_at(row)
        ramp = sizes.changes if wanted == sizes.size_at(row) else (*sizes.changes, (row, wanted))
        raise UserError(
            f"{run} has read {row} rows in other batches than the experiment has now: for batches of {wanted} rows "
            f"from here on, set batch_size={sizes.first} and batch_ramp={ramp}."
        )
    if other := first_other_rate(experiment, record["experiment"], step):
        raise UserError(
            f"{run} has {step} steps behind it, and step {other.step} had a learning rate of {other.was:.4g} where the "
            f"schedule now has {other.now:.4g}: {keeping_rates(experiment, step)}."
        )
    try:
        data.require_same(progress["data"], data_row)
    except UserError as error:
        raise UserError(
            f"{error}. Another mixture goes on from here as mixture.stage(at_row={data_row}, mixture=...); UniMax and "
            "caps share out all rows of a run, so they do not allow for another number of them."
        ) from None
