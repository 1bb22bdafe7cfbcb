"""Members of ensembles small enough to train in seconds, for the files beside."""

import dataclasses

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.skipping import SkipStep

STEPS, ROWS = 12, 8
BASE = Mixture.temperature(0.5, "bytes")
OWN = [
    {"data.mixture": BASE},
    {"data.mixture": BASE.without("el"), "seed": 5},
    {"data.mixture": Mixture.proportional(), "schedule": WSD(peak=4e-3, warmup=2)},
    {"data.mixture": BASE.scale(mt=4.0), "data.seed": 9, "seed": 7},
]
WILD = WSD(peak=1e38, warmup=2)  # weights overflow in the second step
HIGH = WSD(peak=30.0, warmup=2)  # losses become huge, and stay finite


def shared_by(tiny, tokenizer, store, heldout, runs):
    """What all members have in common."""
    return Experiment(
        name="shared",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(store=str(store.path), mixture=BASE, sequence_length=32),
        heldout=str(heldout.path),
        model=tiny,
        schedule=WSD(peak=2e-3, warmup=2),
        steps=STEPS,
        batch_size=ROWS,
        log_every=3,
        evaluate_every=5,
        evaluate_rows=2,
        checkpoint_every=6,
        skip=SkipStep(at_most=3),
        saving=Saving(before_decay=False, asynchronous=False),
        runs=str(runs),
    )


def member(shared, number, **changes):
    own = {**OWN[number], "name": f"member-{number}", **changes}
    mixture, order = own.pop("data.mixture"), own.pop("data.seed", shared.data.seed)
    data = dataclasses.replace(shared.data, mixture=mixture, seed=order)
    return dataclasses.replace(shared, data=data, **own)
