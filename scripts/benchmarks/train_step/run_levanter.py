"""Levanter's own `train_lm`, whose steps wait for their turn. Weights, gradients and moments are float32."""

import os
import tempfile
from importlib.metadata import version
from typing import Any

from turns import Turns, case, rows

os.environ |= {"JAX_PLATFORMS": "cpu"}


def main() -> None:
    turns, shape = Turns(), case()
    import jax
    import jax.numpy as jnp
    import jmp
    from levanter.checkpoint import CheckpointerConfig
    from levanter.data.dataset import ListAsyncDataset
    from levanter.data.text.datasets import DirectDatasetComponent, LmDataConfig
    from levanter.data.text.examples import GrugLmExample
    from levanter.distributed import DistributedConfig
    from levanter.layers.attention import AttentionBackend
    from levanter.main import train_lm
    from levanter.models.llama import LlamaConfig
    from levanter.optim.config import AdamConfig
    from levanter.tracker.json_logger import JsonLoggerConfig
    from levanter.trainer import Trainer
    from levanter.utils.jax_utils import parameter_count

    train_step = Trainer.train_step
    told = False

    def in_turn(self: Any, state: Any, *batch: Any, **more: Any) -> Any:
        nonlocal told
        if not told:
            turns.say(
                versions={name: version(name) for name in ("marin-levanter", "jax")},
                parameters=parameter_count(state.model),
            )
            told = True
        turns.form()

        def work() -> Any:
            info = train_step(self, state, *batch, **more)
            jax.block_until_ready(jax.tree.leaves(info.state))
            return info

        return turns.step(work, lambda info: float(info.loss))

    Trainer.train_step = in_turn
    tokens = [GrugLmExample.causal(jnp.asarray(row)) for row in rows(shape)[0]]
    with tempfile.TemporaryDirectory() as folder:
        train_lm.main(
            train_lm.TrainLmConfig(
                data=LmDataConfig(
                    components={"rows": DirectDatasetComponent(datasets={"train": ListAsyncDataset(tokens)})},
                    tokenizer="passthrough",
                    vocab_size=shape["vocab"],
                    shuffle=False,
                ),
                model=LlamaConfig(
                    max_seq_len=shape["length"],
                    hidden_dim=shape["width"],
                    intermediate_dim=shape["mlp"],
                    num_layers=shape["depth"],
                    num_heads=shape["heads"],
                    num_kv_heads=shape["kv_heads"],
                    head_dim=shape["head_dim"],
                    attn_backend=getattr(AttentionBackend, shape["attention"]),
                    gradient_checkpointing=shape["remat"],
                    reference_checkpoint=None,
                ),
                optimizer=AdamConfig(learning_rate=1e-4, lr_schedule="constant", warmup=0),
                trainer=train_lm.TrainerConfig(
                    mp=jmp.get_policy("p=f32,c=bfloat16"),
                    num_train_steps=10000,
                    train_batch_size=shape["batch"],
                    tracker=JsonLoggerConfig(),
                    require_accelerator=False,
                    log_jaxprs=False,
                    log_xla_hlo=False,
                    log_dir=folder,
                    checkpointer=CheckpointerConfig(base_path=f"{folder}/checkpoints", save_interval=None, keep=[]),
                    distributed=DistributedConfig(initialize_jax_distributed=False),
                ),
            )
        )


if __name__ == "__main__":
    main()
