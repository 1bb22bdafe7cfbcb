"""Named model shapes with the numbers that their authors published, in the context stage that they published last.

Sizes of a family differ where `replace` says so, and nowhere else. docs/families.md has them all in a table, with
licences, parameter counts, what was derived, and where a card contradicts its own weights.
"""

from dataclasses import replace

from eurollm_jax.model.config import (
    Attention,
    BalanceLoss,
    Gated,
    LinearScaling,
    Llama3Scaling,
    MoE,
    Norm,
    Rope,
    TransformerConfig,
    Ungated,
    YarnScaling,
)

THETA_1E6 = (Attention(rope=Rope(1e6)),)  # every layer sees all before it, as where no pattern is given

# ------------------------------------------------------------------------------- EuroLLM, HPLT, OpenEuroLLM

# https://huggingface.co/utter-project/EuroLLM-1.7B/blob/main/config.json
EUROLLM_1_7B = TransformerConfig(
    vocab_size=128_000, width=2048, depth=24, heads=16, kv_heads=8, head_dim=128, mlp=Gated(5632), max_positions=4096
)

# https://huggingface.co/utter-project/EuroLLM-9B/blob/main/config.json
EUROLLM_9B = replace(EUROLLM_1_7B, width=4096, depth=42, heads=32, mlp=Gated(12_288))

# https://huggingface.co/utter-project/EuroLLM-22B-2512, whose card says 56 layers: 54 give its 22.6 billion parameters.
EUROLLM_22B = replace(
    EUROLLM_9B, width=6144, depth=54, heads=48, mlp=Gated(16_384), max_positions=32_768, pattern=THETA_1E6
)

# https://huggingface.co/HPLT/hplt2c_eng_checkpoints, https://arxiv.org/abs/2511.01066
HPLT_2B = TransformerConfig(
    vocab_size=262_144,  # Gemma 3's tokenizer
    width=2048,
    depth=24,
    heads=32,
    kv_heads=32,
    head_dim=64,
    mlp=Gated(8192),
    max_positions=2048,
    tied=True,
)

# https://huggingface.co/openeurollm/datamix-2b-80-20 and its sisters: HPLT's shape, on mixtures.
DATAMIX_2B = HPLT_2B

# https://github.com/OpenEuroLLM/oellm-autoexp, config/backend/megatron/baby/models/qwen3_dense_9b.yaml
OPENEUROLLM_9B = TransformerConfig(
    vocab_size=262_144,  # https://huggingface.co/openeurollm/tokenizer-256k
    width=4096,
    depth=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=Gated(12_288),
    max_positions=4096,
    pattern=(Attention(rope=Rope(1e5)),),
    qk_norm="head",
)

# -------------------------------------------------------------------------- Salamandra, Viking, Minerva, Apertus

# https://huggingface.co/BSC-LT/salamandra-2b, https://github.com/langtech-bsc/salamandra, configs/bsc_2b.yaml
SALAMANDRA_2B = TransformerConfig(
    vocab_size=256_000, width=2048, depth=24, heads=16, kv_heads=16, head_dim=128, mlp=Gated(5440), max_positions=8192
)

# https://huggingface.co/BSC-LT/salamandra-7b, https://github.com/langtech-bsc/salamandra, configs/bsc_7b.yaml
SALAMANDRA_7B = replace(SALAMANDRA_2B, width=4096, depth=32, heads=32, kv_heads=8, mlp=Gated(11_008))

# https://huggingface.co/LumiOpen/Viking-7B/blob/main/config.json
VIKING_7B = TransformerConfig(
    vocab_size=131_072, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp=Gated(11_008), max_positions=4096
)

# https://huggingface.co/sapienzanlp/Minerva-7B-base-v1.0/blob/main/config.json
MINERVA_7B = TransformerConfig(
    vocab_size=51_200, width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, mlp=Gated(14_336), max_positions=4096
)

# https://huggingface.co/swiss-ai/Apertus-8B-2509/blob/main/config.json. Before it was extended to 65536 positions:
# theta 5e5 with the same scaling, 4096 positions.
APERTUS_8B = TransformerConfig(
    vocab_size=131_072,
    width=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=Ungated(21_504),
    max_positions=65_536,
    pattern=(Attention(rope=Rope(12e6, Llama3Scaling(factor=8.0, original_positions=8192))),),
    qk_norm="head",
)

# ------------------------------------------------------------------------------------------------------ Qwen3

# https://huggingface.co/Qwen/Qwen3-8B-Base/blob/main/config.json. The chat models say 40960 positions.
QWEN3_8B = TransformerConfig(
    vocab_size=151_936,
    width=4096,
    depth=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=Gated(12_288),
    max_positions=32_768,
    pattern=THETA_1E6,
    norm=Norm(eps=1e-6),
    qk_norm="head",
)

# https://huggingface.co/Qwen/Qwen3-4B-Base/blob/main/config.json
QWEN3_4B = replace(QWEN3_8B, width=2560, mlp=Gated(9728), tied=True)

# https://huggingface.co/Qwen/Qwen3-1.7B-Base/blob/main/config.json
QWEN3_1_7B = replace(QWEN3_4B, width=2048, depth=28, heads=16, mlp=Gated(6144))

# https://huggingface.co/Qwen/Qwen3-0.6B-Base/blob/main/config.json
QWEN3_0_6B = replace(QWEN3_1_7B, width=1024, mlp=Gated(3072))

# https://huggingface.co/Qwen/Qwen3-30B-A3B-Base/blob/main/config.json
QWEN3_30B_A3B = replace(
    QWEN3_8B,
    width=2048,
    depth=48,
    kv_heads=4,
    mlp=MoE(experts=128, top_k=8, hidden=768, balance=BalanceLoss(0.001)),
)

# ------------------------------------------------------------------------------- OLMo, Gemma, SmolLM, Mixtral

# https://huggingface.co/allenai/OLMo-2-1124-7B/blob/main/config.json
OLMO2_7B = TransformerConfig(
    vocab_size=100_352,
    width=4096,
    depth=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp=Gated(11_008),
    max_positions=4096,
    pattern=(Attention(rope=Rope(5e5)),),
    norm=Norm(place="post", eps=1e-6),
    qk_norm="full",
)

# https://huggingface.co/allenai/Olmo-3-1025-7B/blob/main/config.json. Before it was extended: 8192 positions, no YaRN.
# Layers with a window keep plain positions: https://github.com/allenai/OLMo-core, with_rope_scaling.
OLMO3_7B = replace(
    OLMO2_7B,
    vocab_size=100_278,
    max_positions=65_536,
    pattern=(
        *3 * (Attention(window=4096, rope=Rope(5e5)),),
        Attention(rope=Rope(5e5, YarnScaling(8.0, original_positions=8192, attention_factor=1.2079441541679836))),
    ),
)

# https://huggingface.co/google/gemma-3-1b-pt/blob/main/config.json
GEMMA3_1B = TransformerConfig(
    vocab_size=262_144,
    width=1152,
    depth=26,
    heads=4,
    kv_heads=1,
    head_dim=256,
    mlp=Gated(6912, "gelu_tanh"),
    max_positions=32_768,
    pattern=(*5 * (Attention(window=512, rope=Rope(1e4)),), Attention(rope=Rope(1e6))),
    norm=Norm(place="both", eps=1e-6, gain="one_plus_weight"),
    qk_norm="head",
    embedding_scale=1152**0.5,
    tied=True,
)

# https://huggingface.co/google/gemma-3-4b-pt/blob/main/config.json, text_config. 64 rows of padding in the vocabulary.
GEMMA3_4B = replace(
    GEMMA3_1B,
    vocab_size=262_208,
    width=2560,
    depth=34,
    heads=8,
    kv_heads=4,
    mlp=Gated(10_240, "gelu_tanh"),
    max_positions=131_072,
    pattern=(
        *5 * (Attention(window=1024, rope=Rope(1e4)),),
        Attention(rope=Rope(1e6, LinearScaling(8.0))),
    ),
    embedding_scale=2560**0.5,
)

# https://huggingface.co/HuggingFaceTB/SmolLM3-3B-Base/blob/main/config.json. Before it was extended: theta 5e4, 4096.
SMOLLM3_3B = TransformerConfig(
    vocab_size=128_256,
    width=2048,
    depth=36,
    heads=16,
    kv_heads=4,
    head_dim=128,
    mlp=Gated(11_008),
    max_positions=65_536,
    pattern=(*3 * (Attention(rope=Rope(5e6)),), Attention(rope=None)),
    norm=Norm(eps=1e-6),
    tied=True,
)

# https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
MIXTRAL_8X7B = TransformerConfig(
    vocab_size=32_000,
    width=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=MoE(experts=8, top_k=2, hidden=14_336, balance=BalanceLoss(0.02)),
    max_positions=32_768,
    pattern=THETA_1E6,
)

# ------------------------------------------------------------------------------------------------------- ours

# For the quick start: a few million tokens are too little for more weights or a larger vocabulary.
NANO = TransformerConfig(
    vocab_size=2048,
    width=192,
    depth=3,
    heads=3,
    kv_heads=3,
    head_dim=64,
    mlp=Gated(512),
    max_positions=512,
    tied=True,
    compute="float32",
    remat="none",
)
