"""eurollm_jax: the program of `eurollm train`, its step compiled ahead, with donated state."""

import jax
import numpy as np
import optax
from batches import batch_of
from turns import Turns, case

from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import flops_per_token, specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.step import build_program

DOCUMENT = 170  # mean length of a packed document, in tokens


def main() -> None:
    turns, shape = Turns(), case()
    config = TransformerConfig(
        vocab_size=shape["vocab"],
        width=shape["width"],
        depth=shape["depth"],
        heads=shape["heads"],
        kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        mlp=Gated(shape["mlp"]),
        max_positions=shape["length"],
        remat=shape["remat"],
    )
    keep_freed_memory()
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    weights = specs(config)
    program = build_program(
        config,
        layout,
        AdamW().build(optax.constant_schedule(1e-4), weights),
        batch_sizes=[shape["batch"]],
        token_bytes=np.ones(shape["vocab"], np.int32),
        sources=1,
        z_loss=0.0,
        skip=SkipStep(),
    )
    train = program.compile_train(shape["batch"], shape["length"])
    state = program.init(jax.random.key(0))
    cuts = {"rows": None, "packed": DOCUMENT}
    batches = {form: layout.place_rows(batch_of(shape, mean_length)) for form, mean_length in cuts.items()}
    turns.say(
        versions={"jax": jax.__version__},
        parameters=count(weights),
        flops_per_token=flops_per_token(config, shape["length"]),
    )
    while True:
        batch = batches[turns.form()]
        state, _ = turns.step(
            lambda state=state, batch=batch: jax.block_until_ready(train(state, batch)),
            lambda done: float(done[1].loss),
        )


if __name__ == "__main__":
    main()
