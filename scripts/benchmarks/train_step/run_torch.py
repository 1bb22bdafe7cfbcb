"""transformers' LlamaForCausalLM with PyTorch's scaled-dot-product attention and fused AdamW, eager and compiled.

`weights` float32: products in bfloat16 by autocast, as everyone else here. bfloat16: weights, gradients and both
moments of the optimizer in bfloat16, which is less work, and another training.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from turns import Turns, case, rows


def main() -> None:
    turns, shape = Turns(), case()
    torch.manual_seed(0)
    dtype = getattr(torch, shape["weights"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            head_dim=shape["head_dim"],
            intermediate_size=shape["mlp"],
            max_position_embeddings=shape["length"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(part).long() for part in rows(shape))

    def mean_loss(tokens: Any, targets: Any) -> Any:
        logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits.float().view(-1, shape["vocab"]), targets.view(-1))

    compute = {"eager": mean_loss, "compiled": torch.compile(mean_loss)}

    def step(form: str) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = compute[form](tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    turns.say(
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        parameters=sum(weight.numel() for weight in model.parameters()),
    )
    while True:
        form = turns.form()
        turns.step(lambda form=form: step(form), lambda loss: float(loss.detach()))


if __name__ == "__main__":
    main()
