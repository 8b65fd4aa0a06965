"""nnx models that others wrote: flax's own modules, mamba2-jax, jraphx; held as `adoption` says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import meshwright
from adoption import STEPS, Package, Watch, check_before, check_mesh

# Their code is theirs: what it deprecates or promotes is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_authors_run() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            heads, width, dropout_rate=0.1, decode=False, deterministic=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Encoder(nnx.Module):
    """Flax's own modules: a stack by nnx.vmap run by nnx.scan, a table that is no Param, a tied
    embedding under two names, dropout."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, rngs)

        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Variable(0.02 * rngs.params.normal((32, width)))
        self.blocks = make(rngs)
        self.out = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)
        self.tied = self.embed

    def __call__(self, tokens: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, block: Block) -> Any:
            return block(x)

        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        x = run(x, self.blocks)
        return self.out(x) + self.tied.attend(x)


def next_token(model: Any, tokens: Any) -> Any:
    logits, wanted = model(tokens)[:, :-1], tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def encoder_before(watch: Watch) -> None:
    batch = jax.random.randint(jax.random.key(1), (16, 24), 0, 96)
    model = Encoder(96, 64, 4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(next_token)(model, batch)
        optimizer.update(model, grads)
        return loss

    for _ in range(STEPS):
        loss = step(model, optimizer, batch)
        watch(loss)


def encoder_after(mesh: str, watch: Watch) -> None:
    batch = jax.random.randint(jax.random.key(1), (16, 24), 0, 96)
    up, down = ("layers", "embed", "mlp"), ("layers", "mlp", "embed")
    dims = {"*/up/kernel": up, "*/down/kernel": down, "embed/*": ("vocab", "embed"), "*": None}

    def make(rngs: nnx.Rngs) -> Encoder:
        return Encoder(96, 64, 4, 3, rngs=rngs)

    optimizer = optax.adam(1e-3)
    plan = meshwright.plan(make, optimizer, next_token, batch, mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)
