"""Which language families should a small model read more of, to serve the official languages of the EU best?

The quick start gives each language a share ~ its bytes ** 0.7, the official ones twice that. Here 35 smaller models, a
seventh of its size, read half a million tokens each: the prior three times, 24 mixtures around it, and the prior
without each group in turn. A law is fitted to their bits per byte on held-out text of the 24 official languages, each
counting the same, and proposes shares for a run of the quick start's length; no language may be read more than four
times. Prior and proposal are then compared in models of the quick start's size, three seeds each.

    make quickstart          # fetches the corpus and trains the tokenizer
    eurollm ablate experiments/mixture_study.py --dry-run      # what it will do, and what that costs
    eurollm ablate experiments/mixture_study.py
"""

from dataclasses import replace

from eurollm_jax.ablation.study import Confirmation, Constraints, Design, Study
from eurollm_jax.model.config import Gated
from eurollm_jax.model.families import NANO
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD
from experiments.quickstart import EXPERIMENT as QUICKSTART

GROUPS = {
    "Germanic": ("Germanic",),
    "Romance": ("Romance",),
    "Slavic in Latin": ("cs", "hr", "pl", "sk", "sl", "sr-Latn"),
    "Slavic in Cyrillic": ("be", "bg", "mk", "sr", "uk"),
    "Uralic": ("Uralic",),
    "Baltic": ("Baltic",),
    "Celtic": ("Celtic",),
    "Others": ("Albanian", "Armenian", "Basque", "Hellenic", "Kartvelian", "Semitic", "Turkic"),
}

PROXY = replace(
    QUICKSTART,
    name="proxy",
    data=replace(QUICKSTART.data, sequence_length=256),
    model=replace(NANO, width=64, depth=2, heads=2, kv_heads=2, head_dim=32, mlp=Gated(192), max_positions=256),
    schedule=WSD(peak=1.4e-2, warmup=10, decay=0.5),
    steps=240,
    log_every=20,
    evaluate_every=80,
    evaluate_rows=2,
    checkpoint_every=120,
    saving=Saving(before_decay=False),
)

STUDY = Study(
    name="mixture-study",
    proxy=PROXY,
    groups=GROUPS,
    design=Design(draws=24, concentrations=(5.0, 50.0), prior_runs=3, leave_one_out=True),
    targets="official",
    constraints=Constraints(max_epochs=4, tokens=QUICKSTART.total_rows * QUICKSTART.data.sequence_length),
    confirmation=Confirmation(
        replace(QUICKSTART, steps=256, evaluate_every=128, evaluate_rows=2, saving=Saving(before_decay=False)),
        seeds=3,
        when_declined=True,
    ),
)
