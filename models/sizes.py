"""The named sizes: one function a model, its docstring naming where the figures come from.

The figures are those of the `config.json` published with each model's weights, and
`count_parameters` of each equals the number of parameters in those weights. A size is a
function, not a table row, so that it can say its source and be read on its own.

Padding is not added: `gpt2-124m` keeps its vocabulary of 50,257, which few axis sizes divide.
Ask for another with `dataclasses.replace(config, vocab_size=50_304)` or the flag of that field.

The sizes with experts are in `moe_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable

from meshwright.models.config import ModelConfig
from meshwright.models.moe_sizes import deepseek_moe_16b, mixtral_8x7b, qwen3_30b_a3b, tiny_moe
from meshwright.sharding.errors import ConfigError, did_you_mean

__all__ = [
    "MODELS",
    "gpt2_1_5b",
    "gpt2_124m",
    "llama3_8b",
    "llama3_70b",
    "llama3_405b",
    "llama_1b",
    "llama_3b",
    "named",
    "qwen3_0_6b",
    "qwen3_8b",
    "tiny",
]


def tiny() -> ModelConfig:
    """A Llama of 885,888 parameters over bytes, for tests and the first run.

    Every dimension but `layers` (4) divides by 8, so a mesh of up to 8 devices can split it.
    """
    return ModelConfig(
        name="tiny",
        vocab_size=256,
        layers=4,
        embed=128,
        heads=8,
        kv_heads=8,
        head_dim=16,
        mlp=384,
        max_length=1024,
        tied=True,
    )


def _gpt2(name: str, *, layers: int, embed: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=50_257,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        mlp=4 * embed,
        max_length=1024,
        norm="layer",
        positions="learned",
        activation="gelu",
        bias=True,
        tied=True,
    )


def gpt2_124m() -> ModelConfig:
    """GPT-2 small, 124,439,808 parameters.

    Source: https://huggingface.co/openai-community/gpt2/blob/main/config.json
    """
    return _gpt2("gpt2-124m", layers=12, embed=768, heads=12)


def gpt2_1_5b() -> ModelConfig:
    """GPT-2 XL, 1,557,611,200 parameters.

    Source: https://huggingface.co/openai-community/gpt2-xl/blob/main/config.json
    """
    return _gpt2("gpt2-1.5b", layers=48, embed=1600, heads=25)


def llama_1b() -> ModelConfig:
    """Llama-3.2-1B, 1,235,814,400 parameters.

    Source: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    """
    return ModelConfig(
        name="llama-1b",
        vocab_size=128_256,
        layers=16,
        embed=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        mlp=8192,
        max_length=131_072,
        rope_theta=500_000.0,
        rope_factor=32.0,
        tied=True,
    )


def llama_3b() -> ModelConfig:
    """Llama-3.2-3B, 3,212,749,824 parameters.

    Source: https://huggingface.co/meta-llama/Llama-3.2-3B/blob/main/config.json
    """
    return ModelConfig(
        name="llama-3b",
        vocab_size=128_256,
        layers=28,
        embed=3072,
        heads=24,
        kv_heads=8,
        head_dim=128,
        mlp=8192,
        max_length=131_072,
        rope_theta=500_000.0,
        rope_factor=32.0,
        tied=True,
    )


def llama3_8b() -> ModelConfig:
    """Meta-Llama-3-8B, 8,030,261,248 parameters; without the frequency scaling of 3.1.

    Source: https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    """
    return ModelConfig(
        name="llama3-8b",
        vocab_size=128_256,
        layers=32,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_length=8192,
        rope_theta=500_000.0,
    )


def llama3_70b() -> ModelConfig:
    """Meta-Llama-3-70B, 70,553,706,496 parameters; without the frequency scaling of 3.1.

    Source: https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
    """
    return ModelConfig(
        name="llama3-70b",
        vocab_size=128_256,
        layers=80,
        embed=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        mlp=28_672,
        max_length=8192,
        rope_theta=500_000.0,
    )


def llama3_405b() -> ModelConfig:
    """Llama-3.1-405B, 405,853,388,800 parameters.

    Source: https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json
    """
    return ModelConfig(
        name="llama3-405b",
        vocab_size=128_256,
        layers=126,
        embed=16_384,
        heads=128,
        kv_heads=8,
        head_dim=128,
        mlp=53_248,
        max_length=131_072,
        rope_theta=500_000.0,
        rope_factor=8.0,
    )


def qwen3_0_6b() -> ModelConfig:
    """Qwen3-0.6B, 596,049,920 parameters.

    Source: https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json
    """
    return ModelConfig(
        name="qwen3-0.6b",
        vocab_size=151_936,
        layers=28,
        embed=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp=3072,
        max_length=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tied=True,
    )


def qwen3_8b() -> ModelConfig:
    """Qwen3-8B, 8,190,735,360 parameters.

    Source: https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json
    """
    return ModelConfig(
        name="qwen3-8b",
        vocab_size=151_936,
        layers=36,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=12_288,
        max_length=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
    )


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "gpt2-124m": gpt2_124m,
    "gpt2-1.5b": gpt2_1_5b,
    "llama-1b": llama_1b,
    "llama-3b": llama_3b,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
    "llama3-405b": llama3_405b,
    "qwen3-0.6b": qwen3_0_6b,
    "qwen3-8b": qwen3_8b,
    "tiny-moe": tiny_moe,
    "mixtral-8x7b": mixtral_8x7b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "deepseek-moe-16b": deepseek_moe_16b,
}
"""The sizes by the name that `--model` takes."""


def named(name: str) -> ModelConfig:
    """Return the configuration called ``name``.

    Raises:
        ConfigError: no size has that name; suggests the near ones.

    >>> named("llama3-8b").layers
    32
    """
    if name not in MODELS:
        raise ConfigError(
            f"unknown model `{name}`",
            why="no named size is called that",
            fix=did_you_mean(name, MODELS),
        )
    return MODELS[name]()
