"""A mixture of experts is its formula: every expert for every token is the oracle.

Both forms of dispatch, their gradients, what is dropped, the losses, and the model around them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.models.config import ExpertConfig, ModelConfig, named
from meshwright.models.experts import Experts, apply_experts, grouped_matmul
from meshwright.models.hooks import Hooks
from meshwright.models.layers import Init
from meshwright.models.pure import functional
from meshwright.models.routing import ExpertSums, expert_loss, load_imbalance, route

ROWS, LENGTH, EMBED, MLP, COUNT = 3, 10, 8, 6, 4
SMALL = dataclasses.replace(
    named("tiny-moe"), layers=2, embed=EMBED, mlp=MLP, heads=2, kv_heads=2, head_dim=4
)
EXPERTS = {
    "softmax": ExpertConfig(count=COUNT, top_k=2),
    "raw-softmax": ExpertConfig(count=COUNT, top_k=2, normalise=False),
    "switch": ExpertConfig(count=COUNT, top_k=1, normalise=False),
    "sigmoid": ExpertConfig(count=COUNT, top_k=3, scoring="sigmoid"),
    "shared": ExpertConfig(count=COUNT, top_k=2, shared=2),
    "biased": ExpertConfig(count=COUNT, top_k=2, balance="bias"),
    "all": ExpertConfig(count=COUNT, top_k=COUNT, normalise=False),
}
everywhere = pytest.mark.parametrize("settings", EXPERTS.values(), ids=EXPERTS)
# The largest factor that has a meaning: an expert takes all tokens of a row.
both_forms = pytest.mark.parametrize("roomy", [False, True], ids=["dropless", "capacity"])


def _config(settings: ExpertConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, experts=settings, **changes)


def _roomy(settings: ExpertConfig) -> ExpertConfig:
    return dataclasses.replace(settings, capacity_factor=settings.count / settings.top_k)


def _layer(config: ModelConfig, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """Parameters well above their initial size, and the layer as a function of them."""
    abstract = nnx.eval_shape(lambda: Experts(config, Init(jax.random.key(0))))
    graph, state = nnx.split(abstract)
    random = np.random.default_rng(seed)
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda leaf: jnp.float32(random.normal(0, 0.5, leaf.shape)), shapes)

    def apply(params: Any, x: jax.Array) -> Any:
        zeros = ExpertSums.zeros(config, x.shape[0])
        return nnx.merge(graph, params)(x, Hooks(), "length", zeros)

    return params, jax.jit(apply)


def _x(seed: int = 1, rows: int = ROWS) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=(rows, LENGTH, EMBED)))


def _naive(config: ModelConfig, params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Every expert for every token, times a weight that is 0 for those not chosen."""
    settings = config.experts

    def mlp(w: dict[str, Any]) -> jax.Array:
        up = x @ w["w_up"]
        hidden = jax.nn.silu(x @ w["w_gate"]) * up if "w_gate" in w else jax.nn.gelu(up)
        return hidden @ w["w_down"]

    logits = x @ params["router"]
    activate = jax.nn.sigmoid if settings.scoring == "sigmoid" else jax.nn.softmax
    scores = activate(logits)
    ranked = scores + params.get("bias", jnp.zeros(COUNT))[None, None]
    rank = jnp.argsort(jnp.argsort(-ranked))  # 0 for the best
    weights = jnp.where(rank < settings.top_k, scores, 0)
    if settings.normalise:
        weights /= weights.sum(-1, keepdims=True)
    matrices = {name: params[name] for name in ("w_gate", "w_up", "w_down") if name in params}
    outputs = [mlp({name: w[e] for name, w in matrices.items()}) for e in range(COUNT)]
    total = jnp.sum(weights[..., None] * jnp.stack(outputs, axis=-2), axis=-2)
    return total + mlp(params["shared"]) if settings.shared else total


@both_forms
@everywhere
def test_outputs_and_gradients_are_the_oracles(settings: ExpertConfig, roomy: bool) -> None:
    config = _config(_roomy(settings) if roomy else settings)
    params, apply = _layer(config)
    target = _x(2)

    def of(layer: Any) -> Any:
        def total(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = layer(params, x)
            return jnp.sum(y * target), y

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, _x())

    (_, y), grads = of(lambda params, x: apply(params, x)[0])
    (_, expected), expected_grads = of(functools.partial(_naive, config))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_gelu_experts_have_two_matrices() -> None:
    config = _config(EXPERTS["softmax"], activation="gelu")
    params, apply = _layer(config)
    assert sorted(params) == ["router", "w_down", "w_up"]
    np.testing.assert_allclose(apply(params, _x())[0], _naive(config, params, _x()), atol=1e-5)


def _skewed(config: ModelConfig, by: float = 1.0) -> tuple[dict[str, Any], Any, jax.Array]:
    """A layer whose router sends most tokens of any row to the same experts."""
    params, apply = _layer(config)
    x = _x().at[..., 0].set(3.0)
    return {**params, "router": params["router"].at[0].set(by * jnp.arange(COUNT))}, apply, x


def test_what_finds_no_room_is_dropped_in_the_rows_order() -> None:
    settings = ExpertConfig(count=COUNT, top_k=2, capacity_factor=1.0)
    config, room = _config(settings), 5  # 10 tokens × 2 choices / 4 experts
    assert settings.capacity(LENGTH) == room
    params, apply, x = _skewed(config)
    y, sums = apply(params, x)

    routing = route(settings, x @ params["router"])
    ids, weights = np.asarray(routing.ids), np.array(routing.weights)
    dropped, load = 0, np.zeros(COUNT, int)
    for row in range(ROWS):
        taken = np.zeros(COUNT, int)
        for token in range(LENGTH):
            for choice, expert in enumerate(ids[row, token]):
                if taken[expert] == room:
                    weights[row, token, choice] = 0
                    dropped += 1
                taken[expert] = min(room, taken[expert] + 1)
                load[expert] += 1
    assert dropped > 0
    matrices = {name: params[name] for name in ("w_gate", "w_up", "w_down")}
    expected = apply_experts(x, routing.ids, jnp.asarray(weights), matrices, capacity=None)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(sums.load[0], load)
    assert int(sums.dropped[0]) == dropped and int(sums.dropped[1]) == 0
    assert int(sums.layer) == 1


def test_no_gradient_reaches_what_was_dropped() -> None:
    config = _config(ExpertConfig(count=COUNT, top_k=1, normalise=False, capacity_factor=1.0))
    params, apply, x = _skewed(config)
    grads = jax.jit(jax.grad(lambda x: jnp.sum(apply(params, x)[0] ** 2)))(x)
    silent = np.all(np.asarray(apply(params, x)[0]) == 0, axis=-1)
    assert 0 < silent.sum() < silent.size
    assert np.all(np.asarray(grads)[silent] == 0) and np.all(np.any(grads[~silent], axis=-1))


@pytest.mark.parametrize("factor", [None, 1.0, 1.5])
def test_a_row_does_not_depend_on_the_others(factor: float | None) -> None:
    """So results are the same however rows fall on devices and microbatches."""
    settings = ExpertConfig(count=COUNT, top_k=2, capacity_factor=factor, z_weight=0.1)
    params, apply, x = _skewed(_config(settings))
    y, sums = apply(params, x)
    parts = [apply(params, x[row : row + 1]) for row in range(ROWS)]
    np.testing.assert_allclose(y, jnp.concatenate([part[0] for part in parts]), atol=1e-6)
    for name in ("loss", "balance", "z"):
        rows = jnp.concatenate([getattr(part[1], name) for part in parts])
        np.testing.assert_allclose(getattr(sums, name), rows, rtol=1e-6)
    for name in ("load", "dropped"):
        total = sum(getattr(part[1], name) for part in parts)
        np.testing.assert_array_equal(getattr(sums, name), total)


@both_forms
def test_replicas_may_be_mapped_over(roomy: bool) -> None:
    """As the train step maps: rows apart, weights not, gradients of each replica by itself."""
    settings = EXPERTS["softmax"]
    params, apply = _layer(_config(_roomy(settings) if roomy else settings))
    x = _x(rows=4)

    def grads(x: jax.Array) -> Any:
        return jax.grad(lambda params: jnp.sum(apply(params, x)[0] ** 2))(params)

    whole = jax.jit(grads)(x)
    apart = jax.jit(jax.vmap(jax.vmap(grads)))(x.reshape(2, 2, 1, LENGTH, EMBED))
    for found, wanted in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(jnp.sum(found, (0, 1)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 5], [0, 0, 12, 0], [12, 0, 0, 0]], ids=str)
def test_a_grouped_matmul_is_a_matmul_a_group(sizes: list[int]) -> None:
    random = np.random.default_rng(3)
    x, w = jnp.float32(random.normal(size=(12, 5))), jnp.float32(random.normal(size=(4, 5, 3)))
    groups = np.repeat(np.arange(4), sizes)
    target = jnp.float32(random.normal(size=(12, 3)))
    expected = jnp.einsum("sd,sdm->sm", x, w[groups])
    np.testing.assert_allclose(grouped_matmul(x, w, jnp.int32(sizes)), expected, atol=1e-5)
    found = jax.grad(lambda x, w: jnp.sum(grouped_matmul(x, w, jnp.int32(sizes)) * target), (0, 1))
    wanted = jax.grad(lambda x, w: jnp.sum(jnp.einsum("sd,sdm->sm", x, w[groups]) * target), (0, 1))
    for a, b in zip(found(x, w), wanted(x, w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# The router.


def test_normalised_scores_are_the_softmax_over_the_chosen() -> None:
    logits = jnp.float32(np.random.default_rng(4).normal(size=(2, 5, COUNT)))
    routing = route(EXPERTS["softmax"], logits)
    chosen = jnp.take_along_axis(logits, routing.ids, axis=-1)
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(chosen), rtol=1e-5)
    assert np.all(np.diff(routing.weights, axis=-1) <= 0)  # best first
    raw = route(EXPERTS["raw-softmax"], logits)
    total = raw.weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(raw.weights, jax.nn.softmax(chosen) * total, rtol=1e-5)


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    logits = jnp.float32([[[2.0, 1.0, 0.0, -1.0]]])
    settings = dataclasses.replace(EXPERTS["biased"], normalise=False)
    routing = route(settings, logits, jnp.float32([0, 0, 0, 9]))
    np.testing.assert_array_equal(routing.ids, [[[3, 0]]])
    scores = jax.nn.softmax(logits)[0, 0]
    np.testing.assert_allclose(routing.weights[0, 0], [scores[3], scores[0]], rtol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = jnp.float32([[[-1e4, -1e4, -1e4, -1e4], [1e4, -1e4, 0, 0]]])
    for settings in EXPERTS.values():
        bias = jnp.zeros(COUNT) if settings.balance == "bias" else None
        routing = route(settings, logits, bias)
        grads = jax.grad(lambda x, s=settings, b=bias: jnp.sum(route(s, x, b).weights[..., 0]))
        assert np.all(np.isfinite(routing.weights)) and np.all(np.isfinite(routing.shares))
        assert np.all(np.isfinite(grads(logits)))


# Losses.


def _reported(settings: ExpertConfig, logits: Any) -> ExpertSums:
    """What a layer reports whose router gives these logits [B, T, E]."""
    logits = jnp.float32(logits)
    config = _config(settings, embed=logits.shape[-1])
    params, apply = _layer(config)
    return apply({**params, "router": jnp.eye(logits.shape[-1])}, logits)[1]


def test_the_balancing_loss_by_hand() -> None:
    """Three tokens choose expert 0 and one expert 1, each with a share of 0.7."""
    certain = np.log([0.7, 0.1, 0.1, 0.1])
    other = np.log([0.1, 0.7, 0.1, 0.1])
    settings = ExpertConfig(count=COUNT, top_k=1, normalise=False, balance_weight=0.5)
    sums = _reported(settings, [[certain, certain, certain, other]])
    mean_shares = (0.55, 0.25)  # of experts 0 and 1
    expected = COUNT * (0.75 * mean_shares[0] + 0.25 * mean_shares[1])
    assert sums.balance[0] == pytest.approx(expected, rel=1e-5)
    assert sums.loss[0] == pytest.approx(0.5 * expected, rel=1e-5)
    np.testing.assert_array_equal(sums.load[0], [3, 1, 0, 0])
    assert float(load_imbalance(sums.load[:1])) == 3.0


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_balancing_loss_is_one_where_the_load_is_even(scoring: Any) -> None:
    settings = ExpertConfig(count=COUNT, top_k=2, scoring=scoring)
    # Each token's two favourites are the next two: all experts are chosen alike.
    logits = np.stack([np.roll([3.0, 2.5, 0.0, 0.0], shift) for shift in range(COUNT)])
    sums = _reported(settings, logits[None])
    assert sums.balance[0] == pytest.approx(1, rel=1e-5)
    assert float(load_imbalance(sums.load[:1])) == 1.0


def test_the_z_loss_by_hand() -> None:
    settings = ExpertConfig(count=COUNT, top_k=2, balance="none", z_weight=0.25)
    sums = _reported(settings, np.log([[[1, 1, 1, 1], [2, 2, 2, 2]]]))
    expected = (np.log(4) ** 2 + np.log(8) ** 2) / 2
    assert sums.z[0] == pytest.approx(expected, rel=1e-5)
    assert sums.loss[0] == pytest.approx(0.25 * expected, rel=1e-5)


def test_the_loss_of_a_row_counts_once_a_token() -> None:
    sums = _reported(EXPERTS["softmax"], np.zeros((2, 3, COUNT)))
    weights = jnp.float32([[1, 1, 1], [1, 0.5, 0]])
    expected = 3 * sums.loss[0] + 1.5 * sums.loss[1]
    assert expert_loss(sums, weights) == pytest.approx(float(expected))


def test_minimising_the_loss_evens_a_skewed_router() -> None:
    params, apply, x = _skewed(_config(EXPERTS["softmax"]))

    @jax.jit
    def step(router: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(router: jax.Array) -> Any:
            sums = apply({**params, "router": router}, x)[1]
            return jnp.sum(sums.balance), sums.load

        grads, load = jax.grad(loss, has_aux=True)(router)
        return router - 0.3 * grads, load_imbalance(load[:1])

    router, imbalance = params["router"], []
    for _ in range(200):
        router, found = step(router)
        imbalance.append(float(found))
    assert imbalance[0] > 1.5 and imbalance[-1] < 1.2


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_bias_evens_a_skewed_router(scoring: Any) -> None:
    """By its sign alone, as Adam and Lion would; the router itself gets no gradient."""
    settings = ExpertConfig(count=COUNT, top_k=2, balance="bias", scoring=scoring)
    params, apply, x = _skewed(_config(settings), by=0.3)
    params["bias"] = jnp.zeros(COUNT)

    @jax.jit
    def step(params: Any) -> Any:
        def loss(params: Any) -> Any:
            sums = apply(params, x)[1]
            return expert_loss(sums, jnp.ones(x.shape[:2])), sums

        (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = {**params, "bias": params["bias"] - 0.01 * jnp.sign(grads["bias"])}
        return params, value, grads, sums.load[:1]

    imbalance = []
    for _ in range(100):
        before = params
        params, value, grads, load = step(params)
        imbalance.append(float(load_imbalance(load)))
        excess = np.asarray(load[0] / load[0].mean() - 1)
        assert value == 0 and not np.any(grads["router"])
        wanted = 0.001 * x[..., 0].size * excess
        np.testing.assert_allclose(grads["bias"], wanted, rtol=1e-5, atol=1e-8)
        moved = np.sign(params["bias"] - before["bias"])[excess != 0]
        np.testing.assert_array_equal(moved, -np.sign(excess[excess != 0]))
    assert imbalance[0] > 1.5 and np.mean(imbalance[-10:]) < 1.2


# The model.

MODEL = dataclasses.replace(
    SMALL,
    layers=3,
    vocab_size=64,
    max_length=32,
    experts=ExpertConfig(count=COUNT, top_k=2, shared=1, first_dense=1, mlp=4),
)
TOKENS: Any = np.random.default_rng(1).integers(0, 64, (2, 16), np.int32)
SUMS = Hooks(collect=lambda scored, sums: (scored, sums))


@functools.cache
def _params(config: ModelConfig) -> dict[str, Any]:
    random = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), functional(config).shapes
    )


def test_experts_change_no_other_initial_value() -> None:
    paths = ("embedding", "layers/attn/wq", "layers/experts/router", "layers/experts/w_up")

    def drawn(settings: ExpertConfig) -> dict[str, Any]:
        def leaves(key: jax.Array) -> dict[str, Any]:
            found = {}
            for path in paths[: 4 if settings.count else 2]:
                keys, params = path.split("/"), functional(_config(settings)).init(key)
                found[path] = functools.reduce(lambda tree, key: tree[key], keys, params)
            return found

        return jax.jit(leaves)(jax.random.key(3))

    plain = drawn(SMALL.experts)
    other = drawn(dataclasses.replace(SMALL.experts, shared=1, balance="bias"))
    for params in (drawn(ExpertConfig()), other):
        for path, leaf in params.items():
            np.testing.assert_array_equal(leaf, plain[path])
    w_up = plain["layers/experts/w_up"]
    assert not np.array_equal(w_up[:, 0], w_up[:, 1])


def test_every_layer_of_experts_reports() -> None:
    logits, sums = functional(MODEL).apply(_params(MODEL), TOKENS, hooks=SUMS)
    plain = functional(MODEL).apply(_params(MODEL), TOKENS)
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(sums.load.sum(1), [TOKENS.size * 2] * 2)
    assert sums.load.shape == (2, COUNT) and int(sums.layer) == 2
    assert sums.loss.shape == sums.balance.shape == (2,) and np.all(sums.balance > 1.5)
    np.testing.assert_allclose(sums.loss, 0.001 * sums.balance, rtol=1e-6)


def test_a_dense_model_reports_nothing() -> None:
    def never(scored: Any, sums: Any) -> Any:
        raise AssertionError("a dense model has no experts to report on")

    config = dataclasses.replace(MODEL, experts=ExpertConfig())
    hooks = Hooks(collect=never, experts=never)
    assert functional(config).apply(_params(config), TOKENS, hooks=hooks).shape == (2, 16, 64)


def test_the_hook_is_given_tokens_choices_and_weights() -> None:
    seen: list[Any] = []

    def experts(x: Any, ids: Any, weights: Any, params: Any, *, capacity: int | None) -> Any:
        shapes = {name: leaf.shape for name, leaf in params.items()}
        seen.append((x.shape, ids.shape, ids.dtype, weights.shape, weights.dtype, shapes, capacity))
        return apply_experts(x, ids, weights, params, capacity=capacity)

    settings = dataclasses.replace(MODEL.experts, capacity_factor=1.25)
    config = dataclasses.replace(MODEL, experts=settings)
    found = functional(config).apply(_params(config), TOKENS, hooks=Hooks(experts=experts))
    np.testing.assert_allclose(found, functional(config).apply(_params(config), TOKENS), atol=1e-5)
    wide, narrow = (COUNT, EMBED, 4), (COUNT, 4, EMBED)
    weights = {"w_up": wide, "w_gate": wide, "w_down": narrow}
    pairs = (2, 16, 2)
    # One layer is traced, however many there are.
    assert seen == [((2, 16, EMBED), pairs, jnp.int32, pairs, jnp.float32, weights, 10)]


@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_token_changes_nothing_before_it(factor: float | None) -> None:
    settings = dataclasses.replace(MODEL.experts, capacity_factor=factor)
    config = dataclasses.replace(MODEL, experts=settings)
    apply = jax.jit(functional(config).apply)
    changed = TOKENS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = (apply(_params(config), tokens) for tokens in (TOKENS, changed))
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert np.abs(before[:, 9] - after[:, 9]).max() > 1e-3


def test_reading_in_pieces_gives_the_whole() -> None:
    """Nothing is dropped in generation, whatever the capacity in training."""
    model = functional(MODEL)
    tight = dataclasses.replace(MODEL.experts, capacity_factor=1.0)
    reader = functional(dataclasses.replace(MODEL, experts=tight))
    params = _params(MODEL)
    expected = jax.jit(model.apply)(params, TOKENS)
    cache = reader.empty_cache(params, 2, 16)
    extend = jax.jit(reader.extend)
    for start, stop in ((0, 7), (7, 14), (14, 15), (15, 16)):
        logits, cache = extend(params, TOKENS[:, start:stop], cache)
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=1e-4)


@pytest.mark.parametrize(("remat", "factor"), [("full", None), ("dots", 1.0)])
def test_recomputing_changes_no_gradient(remat: Any, factor: float | None) -> None:
    settings = dataclasses.replace(MODEL.experts, capacity_factor=factor, z_weight=0.01)
    config = dataclasses.replace(MODEL, experts=settings)

    def grads(config: ModelConfig) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, sums = functional(config).apply(params, TOKENS, hooks=SUMS)
            return jnp.mean(jnp.square(logits)) + expert_loss(sums, jnp.ones(TOKENS.shape))

        return jax.jit(jax.grad(loss))(_params(config))

    for plain, again in zip(
        jax.tree.leaves(grads(config)),
        jax.tree.leaves(grads(dataclasses.replace(config, remat=remat))),
        strict=True,
    ):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


@both_forms
def test_bfloat16_parameters_compute_in_bfloat16(roomy: bool) -> None:
    settings = _roomy(EXPERTS["shared"]) if roomy else EXPERTS["shared"]
    params, apply = _layer(_config(settings))
    half = jax.tree.map(jnp.bfloat16, params)
    y, sums = apply(half, jnp.bfloat16(_x()))
    assert y.dtype == jnp.bfloat16 and sums.loss.dtype == jnp.float32
    rounded = jax.tree.map(jnp.float32, half)
    exact, exactly = apply(rounded, jnp.float32(jnp.bfloat16(_x())))
    # The router sums in float32, so the choices are the same and only the experts round.
    np.testing.assert_array_equal(sums.load, exactly.load)
    np.testing.assert_allclose(sums.z, exactly.z, rtol=1e-5)
    assert np.abs(y - exact).max() < 0.03 * np.abs(exact).max()

    def total(params: Any) -> jax.Array:
        return jnp.sum(apply(params, jnp.bfloat16(_x()))[0].astype(jnp.float32))

    grads = jax.jit(jax.grad(total))(half)
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads))
