"""Compilers by package metadata: which is missing, which does not pair, what mends it."""

from __future__ import annotations

import pytest

from meshwright.sharding import aot_wheels
from meshwright.sharding.aot_wheels import require_wheels, versions, wheels
from meshwright.sharding.errors import MissingExtraError
from meshwright.sharding.topology import Topology


def _installed(monkeypatch: pytest.MonkeyPatch, found: dict[str, str], jax: list[str]) -> None:
    monkeypatch.setattr(aot_wheels, "_version", found.get)
    monkeypatch.setattr(aot_wheels.metadata, "requires", lambda name: jax)


TPU_LINE = ['libtpu==0.0.42.*; extra == "tpu"', "numpy>=2"]


@pytest.mark.parametrize(
    ("version", "paired"), [("0.0.42.1", True), ("0.0.42", True), ("0.0.420", False)]
)
def test_libtpu_pairs_by_jaxs_own_metadata(
    monkeypatch: pytest.MonkeyPatch, version: str, paired: bool
) -> None:
    _installed(monkeypatch, {"jax": "0.10.2", "libtpu": version}, TPU_LINE)
    found = wheels("tpu")
    assert (found.installed, found.pairs_with, found.paired) == (version, "0.0.42.*", paired)
    note = require_wheels(Topology.parse("v5e:2x2"))
    assert (note is None) == paired
    if note:
        assert "pip install 'libtpu==0.0.42.*'" in note and version in note


def test_missing_wheels_name_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, {"jax": "0.10.2", "jaxlib": "0.10.2"}, TPU_LINE)
    with pytest.raises(MissingExtraError, match=r"fix:   pip install 'meshwright\[tpu\]'$"):
        require_wheels(Topology.parse("v5e:2x2"))
    with pytest.raises(MissingExtraError, match=r"fix:   pip install 'meshwright\[gpu-plan\]'$"):
        require_wheels(Topology.parse("h100:1x8"))
    assert require_wheels(Topology.parse("cpu:8")) is None
    assert versions() == {"jax": "0.10.2", "jaxlib": "0.10.2"}


@pytest.mark.parametrize("pjrt", ["0.10.1", "0.10.2"])
def test_a_cuda_plugin_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, pjrt: str
) -> None:
    plugin = {"jax-cuda12-plugin": "0.10.1", "jax-cuda12-pjrt": pjrt}
    _installed(monkeypatch, {"jaxlib": "0.10.2", **plugin}, TPU_LINE)
    with pytest.raises(MissingExtraError) as caught:
        require_wheels(Topology.parse("h100:1x8"))
    expected = "pip install 'jax-cuda12-plugin==0.10.2' 'jax-cuda12-pjrt==0.10.2'"
    assert caught.value.fix == expected
    assert "0.10.1" in caught.value.why and "jaxlib 0.10.2" in caught.value.why
