"""Parallel training of Flax models on JAX: declare, resolve, train.

``meshwright.sharding`` is the toolkit, ``meshwright.models`` the decoders, ``meshwright.train``
the loop. Each is imported on first use, and none of them imports jax before it has to. `plan` takes
a Flax model of yours and returns a `Plan` that makes its state, steps, saves and restores on any
mesh; a `Placer` only places, for those who keep their own step. `RunPlan` and `analyze` say what a
step will hold, move and take on hardware that is not here: a training run's own, and anybody's.

>>> import meshwright
>>> meshwright.sharding.ConfigError.__name__
'ConfigError'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright import models as models
    from meshwright import sharding as sharding
    from meshwright import testing as testing
    from meshwright import train as train
    from meshwright.sharding.analysis import analyze as analyze
    from meshwright.sharding.placer import Placer as Placer
    from meshwright.train.model_plan import Plan as Plan
    from meshwright.train.model_plan import plan as plan
    from meshwright.train.run_plan import RunPlan as RunPlan

    __version__: str

__all__ = [
    "Placer",
    "Plan",
    "RunPlan",
    "__version__",
    "analyze",
    "models",
    "plan",
    "sharding",
    "testing",
    "train",
]

_MODULE_OF = {
    "Placer": "sharding.placer",
    "Plan": "train.model_plan",
    "RunPlan": "train.run_plan",
    "analyze": "sharding.analysis",
    "plan": "train.model_plan",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        # importlib.metadata takes longer to import than the rest of this package together.
        from importlib.metadata import version

        return version(__name__)
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
