"""Experiments small enough to be compiled in a test, for plans."""

import dataclasses

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, MoE, TransformerConfig
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training.schedule import Constant

SMALL = TransformerConfig(
    vocab_size=320,
    width=96,
    depth=4,
    heads=8,
    kv_heads=4,
    head_dim=16,
    mlp=Gated(208),
    max_positions=64,
    compute="float32",
    remat="none",
    attention_kernel="reference",
)
MIXED = dataclasses.replace(SMALL, mlp=MoE(experts=4, top_k=2, hidden=64))


def experiment(model=SMALL, *, length=64, rows=16, **changes):
    mesh = changes.pop("mesh", MeshConfig())
    return Experiment(
        name="small",
        tokenizer="none",
        heldout="none",
        data=DataConfig(store="none", mixture=Mixture.proportional(), sequence_length=length),
        model=dataclasses.replace(model, max_positions=max(length, model.max_positions)),
        schedule=Constant(peak=1e-3, warmup=1),
        steps=changes.pop("steps", 10),
        batch_size=rows,
        mesh=mesh,
        **changes,
    )


def with_model(planned, **changes):
    return dataclasses.replace(planned, model=dataclasses.replace(planned.model, **changes))
