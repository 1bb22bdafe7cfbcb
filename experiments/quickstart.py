"""How much European language can a model learn on a laptop while one has a coffee?

A nano model reads the starter corpus, every language a share ~ (its bytes) ** 0.5, and is compared with `xz -9e` on
held-out text.

    make quickstart          # fetches the corpus, trains the tokenizer, and then runs this
    eurollm train experiments/quickstart.py
"""

from eurollm_jax.cli import run
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.families import NANO
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.schedule import WSD

EXPERIMENT = Experiment(
    name="quickstart",
    tokenizer="data/starter/tokenizer",
    data=DataConfig(store="data/starter/store/train", mixture=Mixture.temperature(0.5, "bytes"), sequence_length=256),
    heldout="data/starter/store/heldout",
    model=NANO,
    optimizer=AdamW(),
    schedule=WSD(peak=3e-3, warmup=50, decay=0.4),
    steps=1000,
    batch_size=16,
    log_every=10,
    evaluate_every=250,
    checkpoint_every=250,
)

if __name__ == "__main__":
    run(__file__)
