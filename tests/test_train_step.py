"""The step: against the hand-written oracle, its collectives, its memory, its guard."""

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_parity import batches, config

from meshwright.models.config import named
from meshwright.sharding.errors import PlacementError, RulesError
from meshwright.train.config import GuardConfig, LossConfig, TrainConfig
from meshwright.train.handwritten import handwritten_step
from meshwright.train.loss import token_loss_sum
from meshwright.train.parity import Case, compare, program_of, run_case
from meshwright.train.step import eval_step, gradients


def test_equals_the_step_written_by_hand() -> None:
    program = program_of(replace(config(), mesh="data=2,fsdp=2,tensor=2"))
    spec, state = program.spec, program.init()
    host = {**batches()[0], "weights": np.ones((16, 16), np.float32)}
    batch = program.place(host)
    by_hand = handwritten_step(
        spec.model.config, spec.mesh, spec.optimizer, spec.clip_norm, spec.compute_dtype
    )
    plain = (batch["tokens"][0], batch["targets"][0])
    params, _, loss = jax.jit(by_hand)(state.params, state.opt_state, *plain)
    expected = jax.device_get(params)
    state, scalars = program.lower_step().compile()(state, batch)
    assert float(scalars["loss"]) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(expected), strict=True
    ):
        # Adam divides by the gradient's own size, so tiny gradients amplify rounding.
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def loops_and_rest(text: str, kind: str) -> tuple[int, int]:
    """Collectives of a kind inside and outside of the loops of a lowered program's HLO."""
    inside = outside = 0
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    for block in re.split(r"\n(?=\S)", text):
        name = re.match(r"%?([\w.\-]+)", block)
        count = len(re.findall(rf" {kind}(?:-start)?\(", block))
        if name and name.group(1) in bodies:
            inside += count
        else:
            outside += count
    return inside, outside


def reductions(mesh: str, **changes: Any) -> tuple[int, int]:
    """All-reduces of the gradient program inside of its loops and outside."""
    program = program_of(replace(config(), mesh=mesh, grad_accum=2, **changes))
    lowered = jax.jit(
        functools.partial(gradients, program.spec, program.spec.constrain()),
        in_shardings=(program.shardings.params, program.batch_shardings),
    ).lower(program.shapes.params, program.batch_shapes())
    return loops_and_rest(lowered.compile().as_text() or "", "all-reduce")


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2"])
def test_gradients_cross_the_data_axes_once_a_step(mesh: str) -> None:
    """Without a tensor axis nothing is reduced inside of any loop, whatever the microbatches."""
    inside, outside = reductions(mesh)
    assert inside == 0 and outside > 0


def test_sharded_accumulation_reduces_every_microbatch() -> None:
    inside, _ = reductions("data=2,fsdp=2", accumulate="sharded")
    assert inside > 0


def scan_residuals(mesh: str, remat: str) -> list[tuple[int, ...]]:
    """Shapes that the layer loop keeps for the backward pass, per layer."""
    base = config()
    program = program_of(replace(base, model=replace(base.model, remat=remat), mesh=mesh))
    traced = jax.make_jaxpr(functools.partial(gradients, program.spec, program.spec.constrain()))(
        program.shapes.params, program.batch_shapes()
    )
    found: list[tuple[int, ...]] = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan" and not found and eqn.params["num_carry"] == 1:
                found.extend(v.aval.shape[1:] for v in eqn.outvars[1:])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(traced.jaxpr)
    return found


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_gathered_weights_are_not_kept_for_the_backward_pass(remat: str) -> None:
    kept = scan_residuals("fsdp=8", remat)
    assert kept, "the layer loop keeps nothing: the walk missed it"
    weights = {(32, 8, 4), (8, 4, 32), (32, 64), (64, 32)}
    assert not weights & set(kept)


def test_weights_cross_the_wire_in_the_compute_dtype() -> None:
    program = program_of(replace(config(), mesh="fsdp=8", dtype="bfloat16"))
    text = program.lower_step().as_text()
    # What the partitioner gathers is what is constrained: a cast before each constraint.
    assert re.search(r"sharding_constraint.*tensor<32x64xbf16>", text)
    assert not re.search(r"sharding_constraint [^\n]*tensor<32x64xf32>[^\n]*\[\{\}, \{\}\]", text)


def test_uneven_rows_do_not_bias_the_loss() -> None:
    program = program_of(replace(config(), mesh="data=8"))
    state = program.init()
    host = batches()[0]
    step = jax.jit(functools.partial(eval_step, program.spec, program.spec.constrain()))
    total, weight = step(state.params, program.place(host))
    params = jax.device_get(state.params)
    logits = program.spec.model.apply(params, jnp.asarray(host["tokens"]))
    expected, _ = token_loss_sum(logits, jnp.asarray(host["targets"]), jnp.asarray(host["weights"]))
    assert float(weight) == host["weights"].sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_refused_update_leaves_everything_but_the_counters() -> None:
    guard = GuardConfig(spike_factor=2.0)
    program = program_of(replace(config(), mesh="data=2,fsdp=2,tensor=2", guard=guard))
    step = program.lower_step().compile()
    state, scalars = step(program.init(), program.place(batches()[0]))
    state = replace(state, grad_norm_mean=jax.device_put(1e-6, state.grad_norm_mean.sharding))
    before = jax.device_get((state.params, state.opt_state))
    state, scalars = step(state, program.place(batches()[1]))
    after = jax.device_get((state.params, state.opt_state))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    assert float(scalars["skipped"]) == 1 and int(state.skipped) == int(state.bad_in_row) == 1
    state = replace(state, grad_norm_mean=jax.device_put(1e6, state.grad_norm_mean.sharding))
    state, scalars = step(state, program.place(batches()[1]))
    assert float(scalars["skipped"]) == 0 and int(state.bad_in_row) == 0 and int(state.step) == 3


def test_state_is_donated_and_keeps_its_layout() -> None:
    program = program_of(replace(config(), mesh="data=4,tensor=2", zero=1))
    state = program.init()
    old = state.params["embedding"]
    new, _ = program.lower_step().compile()(state, program.place(batches()[0]))
    assert old.is_deleted()
    same = jax.tree.map(
        lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim),
        new,
        program.shardings,
    )
    assert all(jax.tree.leaves(same))


def test_moments_are_split_where_their_parameters_are() -> None:
    program = program_of(replace(config(), mesh="data=2,fsdp=4"))
    moments = program.shardings.opt_state[0].mu
    assert moments["layers"]["mlp"]["w_up"].spec == jax.P(None, "fsdp")
    assert moments["embedding"].spec == jax.P(None, "fsdp")


def test_activation_rule_that_nothing_uses() -> None:
    program = program_of(replace(config(), mesh="data=8", rules=("activations.mlp=none",)))
    program.lower_step()
    text = ("activations.vocabx=none",)
    with pytest.raises(RulesError, match="vocab"):
        program_of(replace(config(), mesh="data=8", rules=text)).lower_step()


def test_indivisible_length_is_refused() -> None:
    rules = ("activations.length=tensor", "activations.heads=none", "activations.kv_heads=none")
    rules += ("activations.mlp=none", "activations.vocab=none")
    bad = replace(config(), mesh="data=2,tensor=4", rules=rules, seq_len=18)
    with pytest.raises(PlacementError, match="18 is not divisible by 8 .2 blocks a device"):
        program_of(bad).lower_step()


def test_clipping_scales_to_the_norm() -> None:
    base = config()
    sgd = replace(
        base.optimizer,
        name="sgd",
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=1.0,
        schedule="constant",
        warmup_steps=0,
        clip_norm=0.5,
    )
    program = program_of(replace(base, mesh="data=8", optimizer=sgd))
    state = program.init()
    before = jax.device_get(state.params)
    state, scalars = program.lower_step().compile()(state, program.place(batches()[0]))
    moved = jax.tree.map(lambda a, b: jnp.asarray(a - b), before, jax.device_get(state.params))
    assert float(scalars["grad_norm"]) > 0.5
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5, rel=1e-3)


def test_loss_options_follow_their_formula() -> None:
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 5, (2, 3)))
    weights = jnp.asarray(rng.random((2, 3)), jnp.float32)
    total, plain = token_loss_sum(logits, targets, weights, z_loss=0.1, label_smoothing=0.2)
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    lse = np.asarray(jax.nn.logsumexp(logits, -1), np.float64)
    picked = np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0]
    token = -(0.8 * picked + 0.2 * logp.mean(-1)) + 0.1 * lse**2
    assert float(total) == pytest.approx(float((np.asarray(weights) * token).sum()), rel=1e-5)
    assert float(plain) == pytest.approx(float((np.asarray(weights) * -picked).sum()), rel=1e-5)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_a_loss_in_chunks_is_the_loss(mesh: str) -> None:
    """Chunked logits change the program and not the numbers, with a head of its own or tied."""
    for tied in (True, False):
        model = replace(named("tiny"), layers=2, tied=tied)
        small = TrainConfig(model=model, batch_size=8, seq_len=32, steps=10)
        rows = np.random.default_rng(0).integers(0, model.vocab_size, (8, 33)).astype(np.int32)
        ones = np.ones((8, 32), np.float32)
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": ones}
        whole = run_case(small, Case("data=1"), [batch] * 2)
        chunked = replace(small, loss=LossConfig(chunks=4, z_loss=0.0))
        found = compare(whole, run_case(chunked, Case(mesh), [batch] * 2))
        assert found.initial_equal
        assert found.gradient < 5e-6 and found.loss < 2e-6, (tied, found)
