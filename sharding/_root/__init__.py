"""Parallel training of Flax models on JAX: declare, resolve, train.

``meshwright.sharding`` is the toolkit, ``meshwright.models`` the decoders, ``meshwright.train``
the loop. Each is imported on first use, and none of them imports jax before it has to. `RunPlan`
and `analyze` say what a step will hold, move and take on hardware that is not here: a training
run's own, and anybody's.

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
    from meshwright import train as train
    from meshwright.sharding.analysis import analyze as analyze
    from meshwright.train.run_plan import RunPlan as RunPlan

    __version__: str

__all__ = ["RunPlan", "__version__", "analyze", "models", "sharding", "train"]

_MODULE_OF = {"RunPlan": "train.run_plan", "analyze": "sharding.analysis"}


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
