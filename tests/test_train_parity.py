"""Same numbers on every mesh: gradients, losses and initial values against one device."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from meshwright.models.config import named
from meshwright.train.config import TrainConfig, default_config
from meshwright.train.parity import Case, Result, all_cases, compare, meshes, run_case

STEPS = 3
LIMIT = 1e-5


def config() -> TrainConfig:
    model = replace(
        named("tiny"), name="small", layers=2, embed=32, mlp=64, head_dim=4, vocab_size=64
    )
    return replace(default_config(), model=model, batch_size=16, seq_len=16, dtype="float32")


@functools.cache
def batches() -> tuple[dict[str, np.ndarray], ...]:
    """Random tokens, with rows of very different weight, so that a mean of means would show."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 64, (16, 17)).astype(np.int32)
        counted = rng.random((16, 16)) < np.linspace(0.05, 1.0, 16)[:, None]
        found.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "weights": counted.astype(np.float32),
            }
        )
    return tuple(found)


@functools.cache
def one_device() -> Result:
    return run_case(config(), Case("data=1"), batches())


def spread() -> list[Case]:
    """Every mesh of 8 and 4 devices once, the other settings dealt round over them."""
    settings = [
        {"grad_accum": 1},
        {"grad_accum": 2},
        {"grad_accum": 2, "zero": 1},
        {"grad_accum": 1, "zero": 2},
        {"grad_accum": 2, "accumulate": "sharded"},
        {"grad_accum": 2, "zero": 2},
    ]
    found = []
    for index, mesh in enumerate(meshes(8) + meshes(4)):
        chosen = dict(settings[index % len(settings)])
        if "data" not in mesh:
            chosen["zero"] = 0
        found.append(Case(mesh, **chosen))
    return found


@pytest.mark.parametrize("case", spread(), ids=str)
def test_parity_with_one_device(case: Case) -> None:
    found = compare(one_device(), run_case(config(), case, batches()))
    assert found.initial_equal
    assert found.gradient < LIMIT
    assert found.loss < LIMIT


@pytest.mark.smoke
def test_parity_of_the_hybrid_with_zero_and_accumulation() -> None:
    case = Case("data=2,fsdp=2,tensor=2", grad_accum=2, zero=1)
    found = compare(one_device(), run_case(config(), case, batches()))
    assert found.initial_equal and found.gradient < LIMIT and found.loss < LIMIT


def test_every_mesh_is_among_the_cases() -> None:
    cases = list(all_cases())
    assert len(meshes(8)) == 10 and len(meshes(4)) == 6
    assert {case.mesh for case in cases} == {m for n in (1, 2, 4, 8) for m in meshes(n)}
    assert any(case.zero == 2 and case.grad_accum == 2 for case in cases)


def test_a_wrong_gradient_would_show() -> None:
    """The comparison itself: a sum over devices left out is far outside the limit."""
    one = one_device()
    halved = replace(one, gradients={"embedding": one.gradients["embedding"] / 2})
    whole = replace(one, gradients={"embedding": one.gradients["embedding"]})
    assert compare(whole, halved).gradient > 0.4
