"""Data, the one compiled step, the loop around it, checkpoints.

Names are imported on first use, so ``import meshwright.train.config`` never imports jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.train.config import TrainConfig as TrainConfig

__all__ = [
    "TrainConfig",
]

_MODULE_OF = {
    "TrainConfig": "config",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
