"""Decoder transformers by configuration: dims are named here, a mesh is never seen.

Names are imported on first use, so ``import meshwright.models.config`` never imports jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.models.config import ExpertConfig as ExpertConfig
    from meshwright.models.config import ModelConfig as ModelConfig
    from meshwright.models.config import active_parameters as active_parameters
    from meshwright.models.config import count_parameters as count_parameters
    from meshwright.models.decoder import Decoder as Decoder
    from meshwright.models.hooks import Hooks as Hooks
    from meshwright.models.pure import Functional as Functional
    from meshwright.models.pure import functional as functional
    from meshwright.models.sampling import generate as generate
    from meshwright.models.sizes import MODELS as MODELS
    from meshwright.models.sizes import named as named

__all__ = [
    "MODELS",
    "Decoder",
    "ExpertConfig",
    "Functional",
    "Hooks",
    "ModelConfig",
    "active_parameters",
    "count_parameters",
    "functional",
    "generate",
    "named",
]

_MODULE_OF = {
    "Decoder": "decoder",
    "ExpertConfig": "config",
    "Functional": "pure",
    "Hooks": "hooks",
    "MODELS": "sizes",
    "ModelConfig": "config",
    "active_parameters": "config",
    "count_parameters": "config",
    "functional": "pure",
    "generate": "sampling",
    "named": "sizes",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
