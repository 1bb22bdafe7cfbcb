"""MaxText's own trainer, whose iterations wait for their turn.

Its synthetic data are one batch of random tokens that stays on the device. Weights, gradients and moments are float32.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from typing import Any

from turns import Turns, case

os.environ |= {"DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu"}


def main() -> None:
    turns, shape = Turns(), case()
    import jax
    from flax import nnx
    from maxtext.trainers.pre_train import train

    iteration = train.training_loop_iteration
    told = False

    def in_turn(state: dict[str, Any], *others: Any) -> Any:
        nonlocal told
        if not told:
            _, params, _ = nnx.split(state["state"].model, nnx.Param, ...)
            turns.say(
                versions={name: version(name) for name in ("maxtext", "jax")},
                parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            )
            told = True
        turns.form()

        def work() -> Any:
            metrics = iteration(state, *others)
            jax.block_until_ready(jax.tree.leaves(state["state"]))
            return metrics

        return turns.step(work, lambda metrics: float(metrics["scalar"]["learning/loss"]))

    train.training_loop_iteration = in_turn
    with tempfile.TemporaryDirectory() as folder:
        options = f"""
            run_name=cpu base_output_directory={folder} hardware=cpu skip_jax_distributed_system=true
            enable_checkpointing=false enable_tensorboard=false log_config=false
            dataset_type=synthetic steps=10000
            max_target_length={shape["length"]} per_device_batch_size={shape["batch"]}
            base_emb_dim={shape["width"]} base_mlp_dim={shape["mlp"]} base_num_decoder_layers={shape["depth"]}
            base_num_query_heads={shape["heads"]} base_num_kv_heads={shape["kv_heads"]} head_dim={shape["head_dim"]}
            vocab_size={shape["vocab"]} dtype=bfloat16 weight_dtype=float32 attention=dot_product
            remat_policy={shape["remat"]} scan_layers=true enable_dropout=false sharding_tolerance=1.0
            opt_type=adamw learning_rate=1e-4 warmup_steps_fraction=0
        """
        train.main([sys.argv[0], *options.split()])


if __name__ == "__main__":
    main()
