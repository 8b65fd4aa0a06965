"""nnx models that others wrote: flax's own modules, mamba2-jax, jraphx; held as `adoption` says."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from adoption import STEPS, Package, Watch, check_before, check_mesh
from flax import nnx
from jax.sharding import PartitionSpec as P

import meshwright

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
        watch(step(model, optimizer, batch))


def encoder_after(mesh: str, watch: Watch) -> None:
    batch = jax.random.randint(jax.random.key(1), (16, 24), 0, 96)
    up, down = ("layers", "embed", "mlp"), ("layers", "mlp", "embed")
    dims = {"*/up/kernel": up, "*/down/kernel": down, "embed/*": ("vocab", "embed"), "*": None}
    make, adam = functools.partial(Encoder, 96, 64, 4, 3), optax.adam(1e-3)
    plan = meshwright.plan(make, optimizer=adam, loss=next_token, batch=batch, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


class Recurrent(nnx.Module):
    """Flax's own modules: convolution, batch statistics, dropout, an LSTM, LoRA."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(8 * 16, 64, rngs=rngs))
        self.lora = nnx.LoRALinear(64, 64, lora_rank=4, rngs=rngs)
        self.head = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.drop(x).reshape(x.shape[0], 8, -1)
        read: Any = self.rnn(x)
        return self.head(nnx.relu(self.lora(read[:, -1])))


def images() -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    return {"x": x, "y": jax.random.randint(jax.random.key(2), (16,), 0, 10)}


def right_class(model: Any, batch: Any) -> Any:
    found = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])
    return found.mean()


def recurrent_before(watch: Watch) -> None:
    batch = images()
    model = Recurrent(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(right_class)(model, batch)
        optimizer.update(model, grads)
        return loss

    for _ in range(STEPS):
        watch(step(model, optimizer, batch))


def recurrent_after(mesh: str, watch: Watch) -> None:
    batch = images()
    dims = {"rnn/cell/??/kernel": ("embed", "mlp"), "*": None}
    plan = meshwright.plan(
        Recurrent, optimizer=optax.adam(1e-3), loss=right_class, batch=batch, mesh=mesh, dims=dims
    )
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


def mamba2_before(watch: Watch) -> None:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config.tiny()
    tokens = jax.random.randint(jax.random.key(1), (16, 48), 0, config.vocab_size)
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss(model: Any, tokens: Any) -> Any:
        return model(tokens, labels=tokens)["loss"]

    @nnx.jit
    def step(model: Any, optimizer: Any, tokens: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, grads)
        return value

    for _ in range(STEPS):
        watch(step(model, optimizer, tokens))


def mamba2_after(mesh: str, watch: Watch) -> None:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config.tiny()
    tokens = jax.random.randint(jax.random.key(1), (16, 48), 0, config.vocab_size)
    model = functools.partial(Mamba2ForCausalLM, config)

    def loss(model: Any, tokens: Any) -> Any:
        return model(tokens, labels=tokens)["loss"]

    dims = {"*embedding": ("vocab", "embed"), "*out_proj/kernel": ("mlp", "embed"), "*": None}
    adam = optax.adam(1e-3)
    plan = meshwright.plan(model, optimizer=adam, loss=loss, batch=tokens, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(tokens))
        watch(metrics["loss"], plan, state, tokens)


def mlp_before(watch: Watch) -> None:
    from jraphx.nn.models import MLP

    x, y = jax.random.normal(jax.random.key(1), (2, 16, 24))
    model = MLP([24, 128, 128, 24], norm="batch_norm", dropout_rate=0.1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    for _ in range(STEPS):
        watch(step(model, optimizer, (x, y)))


def mlp_after(mesh: str, watch: Watch) -> None:
    from jraphx.nn.models import MLP

    x, y = jax.random.normal(jax.random.key(1), (2, 16, 24))
    model = functools.partial(MLP, [24, 128, 128, 24], norm="batch_norm", dropout_rate=0.1)

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    dims = {"lins/0/kernel": ("embed", "mlp"), "lins/1/kernel": ("mlp", "embed"), "*": None}
    adam = optax.adam(1e-3)
    plan = meshwright.plan(model, optimizer=adam, loss=loss, batch=(x, y), mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place((x, y)))
        watch(metrics["loss"], plan, state, (x, y))


def graphs() -> dict[str, Any]:
    x, y = jax.random.normal(jax.random.key(1), (2, 16, 8, 8))
    return {"x": x, "y": y, "edges": jax.random.randint(jax.random.key(3), (16, 2, 20), 0, 8)}


def gat_before(watch: Watch) -> None:
    from jraphx.nn.models import GAT

    model = GAT(8, hidden_features=64, num_layers=2, out_features=8, heads=4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    batch = graphs()

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((jax.vmap(model)(batch["x"], batch["edges"]) - batch["y"]) ** 2)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    for _ in range(STEPS):
        watch(step(model, optimizer, batch))


def gat_after(mesh: str, watch: Watch) -> None:
    from jraphx.nn.models import GAT

    model = functools.partial(GAT, 8, hidden_features=64, num_layers=2, out_features=8, heads=4)
    batch = graphs()

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((jax.vmap(model)(batch["x"], batch["edges"]) - batch["y"]) ** 2)

    plan = meshwright.plan(model, optimizer=optax.adam(1e-3), loss=loss, batch=batch, mesh=mesh)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


PACKAGES = {
    "encoder": Package(
        encoder_before,
        encoder_after,
        splits={
            "embed/embedding": P("tensor"),
            "blocks/up/kernel": P(None, None, "tensor"),
            "blocks/down/kernel": P(None, "tensor"),
        },
    ),
    "recurrent": Package(
        recurrent_before, recurrent_after, splits={"rnn/cell/ig/kernel": P(None, "tensor")}
    ),
    "mamba2-jax": Package(
        mamba2_before,
        mamba2_after,
        splits={
            "backbone/embedder/embedding": P("tensor"),
            "backbone/layers/0/mixer/out_proj/kernel": P("tensor"),
        },
        needs="mamba2_jax",
    ),
    "jraphx-mlp": Package(
        mlp_before,
        mlp_after,
        splits={"lins/0/kernel": P(None, "tensor"), "lins/1/kernel": P("tensor")},
        needs="jraphx",
    ),
    "jraphx-gat": Package(gat_before, gat_after, needs="jraphx"),
}
CASES = [(name, mesh) for name, package in PACKAGES.items() for mesh in package.meshes]


@pytest.mark.parametrize("name", PACKAGES)
def test_adopting_costs_ten_lines(name: str) -> None:
    check_before(PACKAGES[name])


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_same_as_one_device(name: str, mesh: str) -> None:
    check_mesh(PACKAGES[name], mesh)
