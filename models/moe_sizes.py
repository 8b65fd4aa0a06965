"""The named sizes with experts: one function a model, as in `sizes`.

The figures are those of the `config.json` published with each model's weights, the weight of
the balancing loss among them. `count_parameters` of each equals the number of parameters in those
weights; the docstrings give it, and the rounded figures that the makers publish, the number of
parameters a token meets among them.

Where the makers balance loads over a whole batch, this project does so over each row: see
`meshwright.models.routing`.
"""

from __future__ import annotations

from meshwright.models.config import ExpertConfig, ModelConfig

__all__ = ["deepseek_moe_16b", "mixtral_8x7b", "qwen3_30b_a3b", "tiny_moe"]


def tiny_moe() -> ModelConfig:
    """`tiny` with eight experts, two a token: 2,659,456 parameters, 889,984 a token.

    An expert is half as wide as the MLP of `tiny`, so that a token meets as many parameters.
    Every dimension but `layers` (4) divides by 8, so a mesh of up to 8 devices can split it.
    """
    return ModelConfig(
        name="tiny-moe",
        vocab_size=256,
        layers=4,
        embed=128,
        heads=8,
        kv_heads=8,
        head_dim=16,
        mlp=192,
        max_length=1024,
        tied=True,
        experts=ExpertConfig(count=8, top_k=2, balance_weight=0.01, z_weight=0.001),
    )


def mixtral_8x7b() -> ModelConfig:
    """Mixtral-8x7B-v0.1, 46,702,792,704 parameters (46.7B), 12,879,925,248 a token (12.9B).

    Published figures: Jiang et al. 2024, "Mixtral of Experts".
    Source: https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
    """
    return ModelConfig(
        name="mixtral-8x7b",
        vocab_size=32_000,
        layers=32,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_length=32_768,
        rope_theta=1_000_000.0,
        experts=ExpertConfig(count=8, top_k=2, balance_weight=0.02),
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B, 30,532,122,624 parameters (30.5B), 3,353,032,704 a token (3.3B).

    `mlp` is what a dense layer would have; there is none.
    Published figures: the model's card.
    Source: https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
    """
    return ModelConfig(
        name="qwen3-30b-a3b",
        vocab_size=151_936,
        layers=48,
        embed=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        mlp=6144,
        max_length=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        experts=ExpertConfig(count=128, top_k=8, mlp=768, balance_weight=0.001),
    )


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE-16B, 16,375,728,128 parameters (16.4B), 2,828,650,496 a token (2.8B).

    64 experts of which a token gets 6, two shared ones, and a first layer without experts.
    Published figures: Dai et al. 2024, "DeepSeekMoE", section 5.
    Source: https://huggingface.co/deepseek-ai/deepseek-moe-16b-base/blob/main/config.json
    """
    return ModelConfig(
        name="deepseek-moe-16b",
        vocab_size=102_400,
        layers=28,
        embed=2048,
        heads=16,
        kv_heads=16,
        head_dim=128,
        mlp=10_944,
        max_length=4096,
        norm_eps=1e-6,
        experts=ExpertConfig(
            count=64,
            top_k=6,
            mlp=1408,
            shared=2,
            normalise=False,
            balance_weight=0.001,
            first_dense=1,
        ),
    )
