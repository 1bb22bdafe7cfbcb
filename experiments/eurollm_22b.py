"""EuroLLM-22B, for planning a run of that size.

Of the card (https://huggingface.co/utter-project/EuroLLM-22B-2512): the model, but for its layers (docs/families.md),
and 4 trillion tokens. Its batches and its schedule we have not read: those here are 8 million tokens in rows of 4,096,
and the shape of EuroLLM-9B's schedule. That the model saw rows of 32,768 tokens in the end is left out.

    eurollm plan --site lumi --nodes 64 experiments/eurollm_22b.py
"""

from dataclasses import replace

from eurollm_jax.cli import run
from eurollm_jax.model.families import EUROLLM_22B
from eurollm_jax.parallel.mesh import MeshConfig
from experiments.eurollm_9b import EXPERIMENT as EUROLLM_9B
from experiments.eurollm_9b import LENGTH, TOKENS

ROWS = 2048

EXPERIMENT = replace(
    EUROLLM_9B,
    name="eurollm-22b",
    model=EUROLLM_22B,
    steps=round(TOKENS / LENGTH / ROWS),
    batch_size=ROWS,
    mesh=MeshConfig(data=-1, fsdp=64),
    accumulate=4,
)

if __name__ == "__main__":
    run(__file__)
