"""Declare where every dimension lives, resolve it on a mesh, place the arrays.

Names are imported on first use, so ``import meshwright.sharding.errors`` never imports jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.sharding.analysis import StepFacts as StepFacts
    from meshwright.sharding.analysis import analyze as analyze
    from meshwright.sharding.decisions import Decision as Decision
    from meshwright.sharding.decisions import Decisions as Decisions
    from meshwright.sharding.decisions import check_mesh as check_mesh
    from meshwright.sharding.decisions import resolve as resolve
    from meshwright.sharding.decisions_page import decisions_html as decisions_html
    from meshwright.sharding.dims import DimPatterns as DimPatterns
    from meshwright.sharding.dims import Leaf as Leaf
    from meshwright.sharding.dims import describe as describe
    from meshwright.sharding.dims import describe_optimizer as describe_optimizer
    from meshwright.sharding.dims import dims_of as dims_of
    from meshwright.sharding.errors import CheckpointError as CheckpointError
    from meshwright.sharding.errors import ConfigError as ConfigError
    from meshwright.sharding.errors import DataError as DataError
    from meshwright.sharding.errors import DimsError as DimsError
    from meshwright.sharding.errors import MeshError as MeshError
    from meshwright.sharding.errors import MeshwrightError as MeshwrightError
    from meshwright.sharding.errors import MissingExtraError as MissingExtraError
    from meshwright.sharding.errors import NonFiniteError as NonFiniteError
    from meshwright.sharding.errors import PlacementError as PlacementError
    from meshwright.sharding.errors import ProcessesError as ProcessesError
    from meshwright.sharding.errors import RulesError as RulesError
    from meshwright.sharding.errors import RunError as RunError
    from meshwright.sharding.errors import TopologyError as TopologyError
    from meshwright.sharding.mesh import MeshSpec as MeshSpec
    from meshwright.sharding.placement import Constrain as Constrain
    from meshwright.sharding.placement import init_sharded as init_sharded
    from meshwright.sharding.placement import shardings_of as shardings_of
    from meshwright.sharding.placer import Placer as Placer
    from meshwright.sharding.placer import TreeLayout as TreeLayout
    from meshwright.sharding.plan_html import report_html as report_html
    from meshwright.sharding.plan_json import report_json as report_json
    from meshwright.sharding.plan_text import print_report as print_report
    from meshwright.sharding.planned import AxisTraffic as AxisTraffic
    from meshwright.sharding.planned import Collective as Collective
    from meshwright.sharding.planned import ComputeEstimate as ComputeEstimate
    from meshwright.sharding.planned import MemoryEstimate as MemoryEstimate
    from meshwright.sharding.planned import PlanReport as PlanReport
    from meshwright.sharding.planned import PlanWarning as PlanWarning
    from meshwright.sharding.planned import StepEstimate as StepEstimate
    from meshwright.sharding.process_rows import rows_of_process as rows_of_process
    from meshwright.sharding.processes import Processes as Processes
    from meshwright.sharding.processes import fetch as fetch
    from meshwright.sharding.processes import start as start
    from meshwright.sharding.rules import Rule as Rule
    from meshwright.sharding.rules import Rules as Rules
    from meshwright.sharding.rules import ShapeRule as ShapeRule
    from meshwright.sharding.rules import Table as Table
    from meshwright.sharding.strategies import Strategy as Strategy
    from meshwright.sharding.strategies import context as context
    from meshwright.sharding.strategies import data as data
    from meshwright.sharding.strategies import expert as expert
    from meshwright.sharding.strategies import fold as fold
    from meshwright.sharding.strategies import fsdp as fsdp
    from meshwright.sharding.strategies import pipeline as pipeline
    from meshwright.sharding.strategies import sequence as sequence
    from meshwright.sharding.strategies import tensor as tensor
    from meshwright.sharding.strategies import zero1 as zero1
    from meshwright.sharding.strategies import zero2 as zero2
    from meshwright.sharding.topology import Topology as Topology

__all__ = [
    "AxisTraffic",
    "CheckpointError",
    "Collective",
    "ComputeEstimate",
    "ConfigError",
    "Constrain",
    "DataError",
    "Decision",
    "Decisions",
    "DimPatterns",
    "DimsError",
    "Leaf",
    "MemoryEstimate",
    "MeshError",
    "MeshSpec",
    "MeshwrightError",
    "MissingExtraError",
    "NonFiniteError",
    "PlacementError",
    "Placer",
    "PlanReport",
    "PlanWarning",
    "Processes",
    "ProcessesError",
    "Rule",
    "Rules",
    "RulesError",
    "RunError",
    "ShapeRule",
    "StepEstimate",
    "StepFacts",
    "Strategy",
    "Table",
    "Topology",
    "TopologyError",
    "TreeLayout",
    "analyze",
    "check_mesh",
    "context",
    "data",
    "decisions_html",
    "describe",
    "describe_optimizer",
    "dims_of",
    "expert",
    "fetch",
    "fold",
    "fsdp",
    "init_sharded",
    "pipeline",
    "print_report",
    "report_html",
    "report_json",
    "resolve",
    "rows_of_process",
    "sequence",
    "shardings_of",
    "start",
    "tensor",
    "zero1",
    "zero2",
]

_MODULE_OF = {
    "AxisTraffic": "planned",
    "CheckpointError": "errors",
    "Collective": "planned",
    "ComputeEstimate": "planned",
    "ConfigError": "errors",
    "Constrain": "placement",
    "DataError": "errors",
    "Decision": "decisions",
    "Decisions": "decisions",
    "DimPatterns": "dims",
    "DimsError": "errors",
    "Leaf": "dims",
    "MemoryEstimate": "planned",
    "MeshError": "errors",
    "MeshSpec": "mesh",
    "MeshwrightError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "PlacementError": "errors",
    "Placer": "placer",
    "PlanReport": "planned",
    "PlanWarning": "planned",
    "Processes": "processes",
    "ProcessesError": "errors",
    "Rule": "rules",
    "Rules": "rules",
    "RulesError": "errors",
    "RunError": "errors",
    "ShapeRule": "rules",
    "StepEstimate": "planned",
    "StepFacts": "analysis",
    "Strategy": "strategies",
    "Table": "rules",
    "Topology": "topology",
    "TopologyError": "errors",
    "TreeLayout": "placer",
    "analyze": "analysis",
    "check_mesh": "decisions",
    "context": "strategies",
    "data": "strategies",
    "decisions_html": "decisions_page",
    "describe": "dims",
    "describe_optimizer": "dims",
    "dims_of": "dims",
    "expert": "strategies",
    "fetch": "processes",
    "fold": "strategies",
    "fsdp": "strategies",
    "init_sharded": "placement",
    "print_report": "plan_text",
    "report_html": "plan_html",
    "report_json": "plan_json",
    "resolve": "decisions",
    "shardings_of": "placement",
    "pipeline": "strategies",
    "rows_of_process": "process_rows",
    "sequence": "strategies",
    "start": "processes",
    "tensor": "strategies",
    "zero1": "strategies",
    "zero2": "strategies",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
