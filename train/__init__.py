"""Data, the one compiled step, the loop around it, checkpoints.

Names are imported on first use, so ``import meshwright.train.config`` never imports jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.train.config import TrainConfig as TrainConfig
    from meshwright.train.config import default_config as default_config
    from meshwright.train.estimate import Estimate as Estimate
    from meshwright.train.layout import Layout as Layout
    from meshwright.train.layout import resolve_layout as resolve_layout
    from meshwright.train.loss import token_loss_sum as token_loss_sum
    from meshwright.train.model_plan import Plan as Plan
    from meshwright.train.model_plan import plan as plan
    from meshwright.train.plan_step import ModelState as ModelState
    from meshwright.train.program import Program as Program
    from meshwright.train.replicas import Batch as Batch
    from meshwright.train.run import run_training as run_training
    from meshwright.train.run_plan import RunPlan as RunPlan
    from meshwright.train.state import TrainState as TrainState
    from meshwright.train.step import StepSpec as StepSpec
    from meshwright.train.step import train_step as train_step

__all__ = [
    "Batch",
    "Estimate",
    "Layout",
    "ModelState",
    "Plan",
    "Program",
    "RunPlan",
    "StepSpec",
    "TrainConfig",
    "TrainState",
    "default_config",
    "plan",
    "resolve_layout",
    "run_training",
    "token_loss_sum",
    "train_step",
]

_MODULE_OF = {
    "Batch": "replicas",
    "Estimate": "estimate",
    "Layout": "layout",
    "ModelState": "plan_step",
    "Plan": "model_plan",
    "RunPlan": "run_plan",
    "Program": "program",
    "StepSpec": "step",
    "TrainConfig": "config",
    "TrainState": "state",
    "default_config": "config",
    "plan": "model_plan",
    "resolve_layout": "layout",
    "run_training": "run",
    "token_loss_sum": "loss",
    "train_step": "step",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
