"""Pictures of who holds what, drawn from what the rules resolve to: `python docs/draw.py`.

A picture is a training run's flags. They go through what ``meshwright train`` does with them
(configuration, mesh, strategies, `resolve_layout`), and the specs that come out are drawn: a
column a device, a row a role, in each the part of an array that the device holds. Nothing about a
strategy is known here, so a picture cannot disagree with the code; a test holds every part against
the indices that jax gives the device.

Two devices that hold the same numbers have the same colour; what is whole is grey. Stripes mark
arrays of one index that are not the same on all devices: sums of gradients that were not yet
added up, and the microbatches of stages.

The files in docs/pictures are what this writes; the site draws them again when it is built. They
are kept so that the pages can be read without building the site.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from boxes import BOX, FLAT, PALETTE, STYLE, array_svg, text_svg
from jax.sharding import PartitionSpec

from meshwright.models.pure import functional
from meshwright.scripts.flags import parse
from meshwright.sharding.decisions import Decisions, axes_of, resolve_dims
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.report import format_spec
from meshwright.train.config import TrainConfig
from meshwright.train.explain import gradients_of, layout_of
from meshwright.train.layout import Layout
from meshwright.train.parallelism import choose_mesh, choose_places

__all__ = ["PICTURES", "Picture", "Row", "Shown", "bounds_of", "main", "picture", "resolved"]

FOLDER = Path(__file__).parent / "pictures"

PICTURES = {
    "data": "--mesh data=4",
    "zero1": "--mesh data=4 --zero 1 --grad-accum 2",
    "zero2": "--mesh data=4 --zero 2 --grad-accum 2",
    "fsdp": "--mesh fsdp=4",
    "hybrid-shard": "--mesh data=2,fsdp=2",
    "tensor": "--mesh tensor=4",
    "sequence": "--mesh tensor=4 --sequence",
    "context": "--mesh context=4",
    "expert": "--mesh expert=4 --model tiny-moe",
    "pipeline": "--mesh stage=4 --grad-accum 4",
    "three": "--mesh data=2,fsdp=2,tensor=2",
}
"""Each picture and the flags of the training run that it shows."""

_KEY, _COLUMN, _COLUMNS = 240, 186, 4  # pixels, pixels, devices beside each other
_GAP, _LINE, _ARRAY = 16, 18, 58  # between arrays, of text, height of an array
_MARGIN = 26  # between devices
_USED = "weights in use"
_FRACTIONS = {2: "½", 3: "⅓", 4: "¼", 8: "⅛"}


@dataclass(frozen=True)
class Shown:
    """One array of a picture.

    Attributes:
        name: the last part of its path, or what it is.
        dims, shape: of what is drawn; dims that no axis splits may be left out.
        spec: where it lives.
        apart: axes whose devices hold different numbers at the same indices.
        upright: whether the first dim is drawn downwards, as rows are, and not backwards.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec
    apart: tuple[str, ...] = ()
    upright: bool = False

    @property
    def label(self) -> str:
        """The spec in words: the axes of each dim that is drawn, or ``whole``."""
        return format_spec(self.spec) if any(self.spec) else "whole"


@dataclass(frozen=True)
class Row:
    """Arrays in one role, or in several in which they live alike."""

    roles: tuple[str, ...]
    arrays: tuple[Shown, ...]


@dataclass(frozen=True)
class Picture:
    """A training run, resolved.

    Attributes:
        name: of the file.
        flags: of ``meshwright train``.
        mesh: filled.
        rows: from top to bottom.
    """

    name: str
    flags: str
    mesh: MeshSpec
    rows: tuple[Row, ...]

    def coordinates(self) -> list[dict[str, int]]:
        """Where each device is on the mesh, in the devices' order."""
        found: list[dict[str, int]] = [{}]
        for axis, size in self.mesh.axes:
            found = [{**place, axis: index} for place in found for index in range(size)]
        return found


def resolved(name: str, flags: str) -> Picture:
    """Resolve the run that a picture shows."""
    config = parse(flags.split(), "train")
    count = MeshSpec.parse(config.mesh).device_count
    mesh = choose_mesh(config, count, simulated=True)
    model = functional(config.model, choose_places(config, mesh))
    layout = layout_of(config, model, mesh)
    partial: tuple[str, ...] = ()
    if config.grad_accum > 1:
        partial = (*layout.unreduced_axes(layout.reduced), *layout.rules.stage_axes())
    rows = [
        Row(("optimizer state",), _weights(layout, layout.masters)),
        Row(("gradients",), _weights(layout, gradients_of(layout, config.grad_accum), partial)),
        Row(("weights",), _weights(layout, layout.working)),
        Row((_USED,), _weights(layout, layout.working, used=True)),
    ]
    # Roles in which all arrays live alike share a row.
    merged = [
        Row(tuple(role for row in same for role in row.roles), arrays)
        for arrays, group in groupby(rows, key=lambda row: row.arrays)
        for same in (list(group),)
    ]
    return Picture(name, flags, mesh, (*merged, _activations(config, layout)))


def _weights(
    layout: Layout, decisions: Decisions, apart: tuple[str, ...] = (), *, used: bool = False
) -> tuple[Shown, ...]:
    """A table that is no layer's and a matrix of each layer, or of its experts."""
    experts = any("experts" in (d.leaf.dims or ()) for d in decisions)
    paths = (
        ("layers/attn/wq", "layers/experts/w_up") if experts else ("embedding", "layers/mlp/w_up")
    )
    found = []
    for path in paths:
        decision = decisions[path]
        spec = layout.compute_spec(decision) if used else decision.spec
        dims, shape = decision.leaf.dims or (), decision.leaf.shape
        split = [axis for entry in spec for axis in axes_of(entry)]
        own = tuple(axis for axis in apart if axis not in split)
        found.append(_shown(path.rpartition("/")[2], dims, shape, spec, own))
    return tuple(found)


def _activations(config: TrainConfig, layout: Layout) -> Row:
    """The stream between a layer's regions, and what is inside of one."""
    model, rows = config.model, config.batch_size // config.grad_accum
    within = ("heads", model.heads) if model.experts.count else ("mlp", model.mlp)
    stages = layout.rules.stage_axes()
    found = []
    for name, tokens, (dim, size) in (
        ("stream", "sequence", ("embed", model.embed)),
        ("attention" if model.experts.count else "hidden", "length", within),
    ):
        dims, shape = ("batch", tokens, dim), (rows, config.seq_len, size)
        spec = resolve_dims(dims, shape, layout.rules, layout.mesh, "activations")
        found.append(_shown(name, dims, shape, spec, stages, upright=True))
    return Row(("activations",), tuple(found))


def _shown(
    name: str,
    dims: Sequence[str | None],
    shape: Sequence[int],
    spec: PartitionSpec,
    apart: tuple[str, ...],
    *,
    upright: bool = False,
) -> Shown:
    """Leave out what is not drawn: sizes of heads, and layers where there is a dim too many."""
    entries = [*spec, *[None] * (len(dims) - len(spec))]
    kept = [index for index, dim in enumerate(dims) if dim != "head_dim"]
    if len(kept) > 3:
        kept = [index for index in kept if dims[index] != "layers"]
    if len(kept) > 3 or any(entries[i] for i in range(len(dims)) if i not in kept):
        raise ValueError(f"cannot draw {name}: {dims} split as {spec}")
    return Shown(
        name,
        tuple(dims[index] or "" for index in kept),
        tuple(shape[index] for index in kept),
        PartitionSpec(*(entries[index] for index in kept)),
        apart,
        upright,
    )


def bounds_of(shown: Shown, mesh: MeshSpec, place: dict[str, int]) -> tuple[tuple[int, int], ...]:
    """Begin and end, in each dim, of the part of an array that a device holds."""
    found = []
    for size, entry in zip(shown.shape, shown.spec, strict=True):
        part, parts = 0, 1
        for axis in axes_of(entry):
            part, parts = part * mesh.sizes[axis] + place[axis], parts * mesh.sizes[axis]
        found.append((size // parts * part, size // parts * (part + 1)))
    return tuple(found)


def picture(name: str, about: str = "") -> str:
    """Draw one of `PICTURES`: the text of an SVG file.

    Args:
        name: which.
        about: what it shows, for those who do not see it; before the specs in words.
    """
    shown = resolved(name, PICTURES[name])
    devices = list(enumerate(shown.coordinates()))
    blocks = [devices[at : at + _COLUMNS] for at in range(0, len(devices), _COLUMNS)]
    drawn, y = [], 6.0
    for block in blocks:
        found, y = _block(shown, block, y)
        drawn += found
    text, y = _legend(shown, y)
    drawn.append(text)
    width, height = _right(min(_COLUMNS, len(devices))) + 2, math.ceil(y)
    said = escape(f"{about} {_in_words(shown)}".strip(), quote=True)
    stripes = (
        f'<pattern id="{_stripes(shown)}" width="7" height="7" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0V7" stroke="#fff" stroke-opacity="0.75" '
        'stroke-width="3"/></pattern>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="mw" viewBox="0 0 {width} {height}"'
            f' role="img" aria-label="{said}">',
            f"<style>{STYLE}</style><defs>{stripes}</defs>",
            *drawn,
            "</svg>\n",
        ]
    )


def _stripes(shown: Picture) -> str:
    return f"mw-stripes-{shown.name}"


def _in_words(shown: Picture) -> str:
    """What a picture says, for those who do not see it."""
    rows = (
        f"{' and '.join(row.roles)}: "
        + ", ".join(f"{array.name} {array.label}" for array in row.arrays)
        for row in shown.rows
    )
    return f"Who holds what on the mesh {shown.mesh}. {'; '.join(rows)}."


def _block(
    shown: Picture, devices: list[tuple[int, dict[str, int]]], y: float
) -> tuple[list[str], float]:
    """The devices beside each other, and below each what it holds; and where the next may begin."""
    header, y = _header(shown, devices, y)
    drawn = [header]
    for row in shown.rows:
        drawn.append(f'<path class="rule" d="M0 {y}H{_right(len(devices))}"/>')
        y += 10
        drawn += _captions(row, y)
        for column, (device, place) in enumerate(devices):
            x = _KEY + column * _COLUMN
            for array in row.arrays:
                drawn.append(_held(shown, row, array, (device, place), (x, y)))
                x += _width(array) + _GAP
        y += max(_ARRAY + 26, _LINE * (len(row.roles) + len(row.arrays)) + 8)
    return drawn, y + 10


def _right(columns: int) -> int:
    return _KEY + _COLUMN * columns - _MARGIN


def _header(
    shown: Picture, devices: list[tuple[int, dict[str, int]]], y: float
) -> tuple[str, float]:
    """Chips with their numbers, under brackets for the mesh axes they share."""
    *outer, (inner, _) = [axis for axis in shown.mesh.axes if axis[1] > 1]
    drawn = []
    for depth in range(len(outer)):
        names = [axis for axis, _ in outer[: depth + 1]]
        columns = enumerate(devices)
        for at, group in groupby(columns, key=lambda d: [d[1][1][axis] for axis in names]):
            first, *_ = found = [column for column, _ in group]
            left = _KEY + first * _COLUMN
            right = _right(found[-1] + 1)
            middle, label = (left + right) / 2, f"{names[-1]} {at[-1]}"
            bar = f"M{left} {y + 22}V{y + 16}H{right}V{y + 22}"
            drawn += [
                f'<path class="rule" d="{bar}"/>',
                text_svg(middle, y + 11, label, "", "middle"),
            ]
        y += 26
    drawn.append(text_svg(0, y + 18, str(shown.mesh).replace(",", ", "), "bold"))
    for column, (device, place) in enumerate(devices):
        x, width = _KEY + column * _COLUMN, _COLUMN - _MARGIN
        drawn.append(f'<rect class="chip" x="{x}" y="{y}" width="{width}" height="27" rx="5"/>')
        drawn.append(text_svg(x + 10, y + 18, f"device {device}", "bold"))
        drawn.append(text_svg(x + width - 10, y + 18, f"{inner} {place[inner]}", "faint", "end"))
    return "\n".join(drawn), y + 38


def _captions(row: Row, y: float) -> list[str]:
    """The roles of a row, and the spec of each of its arrays."""
    lines = [(role, "bold") for role in row.roles]
    lines += [(f"{array.name} {array.label}", "code faint") for array in row.arrays]
    if row.roles == (_USED,):  # gathered, since it is not how they are kept
        lines.append(("one layer at a time", "small faint"))
    return [
        text_svg(0, y + 14 + index * _LINE, text, kind) for index, (text, kind) in enumerate(lines)
    ]


def _held(
    shown: Picture,
    row: Row,
    array: Shown,
    device: tuple[int, dict[str, int]],
    corner: tuple[float, float],
) -> str:
    """What one device holds of an array, with the indices for readers and for tests."""
    number, place = device
    bounds = bounds_of(array, shown.mesh, place)
    parts = [math.prod(shown.mesh.sizes[axis] for axis in axes_of(entry)) for entry in array.spec]
    apart = _differs(shown, array)
    index = ",".join(f"{begin}:{end}" for begin, end in bounds)
    where = tuple((b / size, e / size) for (b, e), size in zip(bounds, array.shape, strict=True))
    split = math.prod(parts)
    fill = PALETTE[_number(shown, array, place) % len(PALETTE)] if split > 1 or apart else ""
    x, y = corner
    below = _FRACTIONS.get(split, f"1/{split}")
    title = f"device {number} holds {array.name}[{index}] of {'×'.join(map(str, array.shape))}"
    return (
        f'<g class="shard" data-roles="{", ".join(row.roles)}" data-array="{array.name}" '
        f'data-spec="{array.label}" data-device="{number}" data-index="{index}">'
        f"<title>{title}</title>"
        + array_svg(
            x,
            y,
            _turned(array, parts),
            _turned(array, where),
            fill,
            stripes=_stripes(shown) if apart else "",
        )
        + text_svg(
            x + _front(array) / 2,
            y + _ARRAY + 14,
            below if split > 1 else "whole",
            "small" if split > 1 else "small faint",
            "middle",
        )
        + "</g>"
    )


def _number(shown: Picture, array: Shown, place: dict[str, int]) -> int:
    """Which of the different contents of an array a device holds."""
    number = 0
    for axis, size in shown.mesh.axes:
        if axis in array.apart or any(axis in axes_of(entry) for entry in array.spec):
            number = number * size + place[axis]
    return number


def _turned(array: Shown, values: Sequence) -> tuple:
    """Values by dim as across, down and back."""
    if len(array.shape) == 2:
        down, across = values
        return across, down
    if array.upright:
        down, across, back = values
    else:
        back, down, across = values
    return across, down, back


def _front(array: Shown) -> float:
    return FLAT[0] if len(array.shape) == 2 else BOX[0]


def _width(array: Shown) -> float:
    return FLAT[0] if len(array.shape) == 2 else BOX[0] + BOX[2]


def _legend(shown: Picture, y: float) -> tuple[str, float]:
    """The arrays with the names of their dims, and what colours mean."""
    drawn = [f'<path class="rule" d="M0 {y}H{_right(_COLUMNS)}"/>']
    y += 14
    drawn.append(text_svg(0, y + 14, "the arrays", "bold"))
    for index, text in enumerate(_meanings(shown)):
        drawn.append(text_svg(0, y + 14 + _LINE * (index + 1), text, "small faint"))
    arrays = [*shown.rows[0].arrays, *shown.rows[-1].arrays]
    for column, array in enumerate(arrays):
        x = _KEY + column * _COLUMN + 26
        across, down, *back = _turned(array, array.dims)
        drawn.append(array_svg(x, y, (1,) * len(array.dims), None, ""))
        top = y + (0 if len(array.dims) == 2 else BOX[3])
        height = FLAT[1] if len(array.dims) == 2 else BOX[1]
        turn = f'transform="rotate(-90 {x - 7:.5g} {top + height / 2:.5g})"'
        label = text_svg(x - 7, top + height / 2, down, "small", "middle")
        drawn.append(label.replace("<text", f"<text {turn}", 1))
        drawn.append(text_svg(x + _front(array) / 2, y + _ARRAY + 12, across, "small", "middle"))
        if back:
            drawn.append(text_svg(x + BOX[0] + 19, y + BOX[3] + BOX[1] + 3, back[0], "small"))
        drawn.append(
            text_svg(x + _front(array) / 2, y + _ARRAY + 30, array.name, "code bold", "middle")
        )
    return "\n".join(drawn), y + _ARRAY + 40


def _meanings(shown: Picture) -> list[str]:
    lines = ["one colour: the same numbers", "grey: whole on every device"]
    *weights, activations = shown.rows
    if any(_differs(shown, array) for row in weights for array in row.arrays):
        lines.append("stripes: sums not yet added up")
    if any(_differs(shown, array) for array in activations.arrays):
        lines.append("stripes: a microbatch each")
    return lines


def _differs(shown: Picture, array: Shown) -> bool:
    return any(shown.mesh.sizes[axis] > 1 for axis in array.apart)


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(picture(name), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
