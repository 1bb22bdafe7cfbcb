"""Named model shapes with the numbers that their authors published."""

from eurollm_jax.model.transformer import TransformerConfig

# https://huggingface.co/utter-project/EuroLLM-1.7B, config.json
EUROLLM_1_7B = TransformerConfig(
    vocab_size=128_000,
    width=2048,
    depth=24,
    heads=16,
    kv_heads=8,
    head_dim=128,
    mlp=5632,
    max_positions=4096,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied=False,
)

# https://huggingface.co/utter-project/EuroLLM-9B, config.json
EUROLLM_9B = TransformerConfig(
    vocab_size=128_000,
    width=4096,
    depth=42,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=12_288,
    max_positions=4096,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied=False,
)

# Ours, for the quick start: a few million tokens are too little for more weights or a larger vocabulary.
NANO = TransformerConfig(
    vocab_size=2048,
    width=192,
    depth=3,
    heads=3,
    kv_heads=3,
    head_dim=64,
    mlp=512,
    max_positions=512,
    tied=True,
    compute="float32",
    remat="none",
)
