"""EuroLLM-9B, as its authors trained it, for planning a run of that size.

Of the card (https://huggingface.co/utter-project/EuroLLM-9B): the model, 4 trillion tokens, rows of 4,096 tokens,
batches of 2,800 rows (400 H100), Adam in bfloat16. A batch has 2,816 rows here, which divide over 256 devices;
`--batch-size 2800` gives the authors'. The report (https://arxiv.org/abs/2506.04079) has a schedule that rises, stays
and falls; its rate, warm-up and decay are ours, and so is the mixture: the stores are yours to prepare.

    eurollm plan --site leonardo --nodes 64 experiments/eurollm_9b.py
    eurollm plan --site marenostrum5 --nodes 100 experiments/eurollm_9b.py --batch-size 2800 --accumulate 7
"""

from eurollm_jax.cli import run
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.families import EUROLLM_9B
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD

TOKENS, LENGTH, ROWS = 4 * 10**12, 4096, 2816

EXPERIMENT = Experiment(
    name="eurollm-9b",
    tokenizer="data/eurollm/tokenizer",
    data=DataConfig(
        store=("data/eurollm/web", "data/eurollm/parallel", "data/eurollm/code"),
        mixture=Mixture.temperature(0.7, "bytes", over="language"),
        sequence_length=LENGTH,
    ),
    heldout="data/eurollm/heldout",
    model=EUROLLM_9B,
    optimizer=AdamW(),
    schedule=WSD(peak=3e-4, warmup=2000, decay=0.1),
    steps=round(TOKENS / LENGTH / ROWS),
    batch_size=ROWS,
    mesh=MeshConfig(data=-1, fsdp=16),
    accumulate=11,
    evaluate_every=2000,
    checkpoint_every=1000,
    saving=Saving(every=10_000, minutes=30),
)

if __name__ == "__main__":
    run(__file__)
