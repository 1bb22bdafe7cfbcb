"""EuroLLM-22B, for planning a run of that size.

Of the card (https://huggingface.co/utter-project/EuroLLM-22B-2512): the model, but for its layers (docs/families.md),
and 4 trillion tokens. Its batches and its schedule we have not read: those here are 8 million tokens in rows of 4,096,
and the shape of EuroLLM-9B's schedule. That the model saw rows of 32,768 tokens in the end is left out.

    eurollm plan --site lumi --nodes 64 experiments/eurollm_22b.py
"""

from eurollm_jax.cli import run
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.families import EUROLLM_22B
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD

TOKENS, LENGTH, ROWS = 4 * 10**12, 4096, 2048

EXPERIMENT = Experiment(
    name="eurollm-22b",
    tokenizer="data/eurollm/tokenizer",
    data=DataConfig(
        store=("data/eurollm/web", "data/eurollm/parallel", "data/eurollm/code"),
        mixture=Mixture.temperature(0.7, "bytes", over="language"),
        sequence_length=LENGTH,
    ),
    heldout="data/eurollm/heldout",
    model=EUROLLM_22B,
    optimizer=AdamW(),
    schedule=WSD(peak=3e-4, warmup=2000, decay=0.1),
    steps=round(TOKENS / LENGTH / ROWS),
    batch_size=ROWS,
    mesh=MeshConfig(data=-1, fsdp=64),
    accumulate=4,
    evaluate_every=2000,
    checkpoint_every=1000,
    saving=Saving(every=10_000, minutes=30),
)

if __name__ == "__main__":
    run(__file__)
