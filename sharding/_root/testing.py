"""Assertions for a project's own tests; see `meshwright.sharding.testing`.

>>> from meshwright.testing import assert_specs
>>> assert_specs.__module__
'meshwright.sharding.testing'
"""

from __future__ import annotations

from meshwright.sharding.testing import PlanLike as PlanLike
from meshwright.sharding.testing import assert_collectives as assert_collectives
from meshwright.sharding.testing import assert_no_recompile as assert_no_recompile
from meshwright.sharding.testing import assert_nothing_replicated as assert_nothing_replicated
from meshwright.sharding.testing import assert_same_as_one_device as assert_same_as_one_device
from meshwright.sharding.testing import assert_specs as assert_specs

__all__ = [
    "PlanLike",
    "assert_collectives",
    "assert_no_recompile",
    "assert_nothing_replicated",
    "assert_same_as_one_device",
    "assert_specs",
]
