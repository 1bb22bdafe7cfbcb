"""How much European language can a model learn on a laptop while one has a coffee?

A nano model reads three million tokens of the starter corpus, each language a share ~ its bytes ** 0.7, the official
languages of the EU twice that, and is compared with `xz -9e` on held-out text.

    make quickstart          # fetches the corpus, trains the tokenizer, and then runs this
    eurollm train experiments/quickstart.py
"""

from eurollm_jax.cli import run
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.languages import official
from eurollm_jax.model.families import NANO
from eurollm_jax.training.optimizer import Muon
from eurollm_jax.training.schedule import WSD

EXPERIMENT = Experiment(
    name="quickstart",
    tokenizer="data/starter/tokenizer",
    data=DataConfig(
        store="data/starter/store/train",
        mixture=Mixture.temperature(0.7, "bytes").scale({language.code: 2.0 for language in official()}),
        sequence_length=512,
    ),
    heldout="data/starter/store/heldout",
    model=NANO,
    optimizer=Muon(),
    schedule=WSD(peak=7e-3, warmup=20, decay=0.5),
    steps=768,
    batch_size=8,
    log_every=8,
    evaluate_every=128,
    evaluate_rows=4,
    checkpoint_every=128,
)

if __name__ == "__main__":
    run(__file__)
