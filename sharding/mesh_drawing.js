// The mesh of a page of decisions: its axes named, a cell a device, coloured by which part of a leaf
// each device holds. Large meshes are abbreviated, and say so.

const GAP = -1; // in place of positions that are not drawn
const drawnOf = (size, most) =>
  size <= most ? [...Array(size).keys()] : [...Array(most - 2).keys(), GAP, size - 1];

// How the mesh is drawn: its last axis across, the one before down, all others as panels.
function arranged() {
  const split = AXES.filter(([, size]) => size > 1);
  const across = split[split.length - 1] || ["", 1];
  const down = split[split.length - 2] || ["", 1];
  const outer = split.slice(0, -2);
  const panels = outer.reduce((product, [, size]) => product * size, 1);
  const shown = drawnOf(panels, 4).map((number) => {
    if (number === GAP) return null;
    const at = {};
    for (const [axis, size] of [...outer].reverse()) {
      at[axis] = number % size;
      number = Math.floor(number / size);
    }
    return at;
  });
  const width = outer.length ? Math.max(22, Math.min(34, Math.floor(118 / Math.min(across[1], 6)))) : 34;
  return { across, down, outer, shown, cell: [width, width < 30 ? 20 : 24], most: outer.length ? [6, 6] : [8, 8] };
}

// The device's number in the mesh's order, last axis fastest.
const numberOf = (at) => AXES.reduce((number, [axis, size]) => number * size + (at[axis] || 0), 0);

function panel(plan, at, cells) {
  const [width, height] = plan.cell;
  const [across, down] = [plan.across, plan.down];
  const lone = !down[0] && across[1] > plan.most[0] && across[1] <= 64; // one axis, in lines
  const columns = lone ? [...Array(8).keys()] : drawnOf(across[1], plan.most[0]);
  const rows = lone ? [...Array(Math.ceil(across[1] / 8)).keys()] : drawnOf(down[1], plan.most[1]);
  const [left, top] = [down[0] || lone ? 30 : 2, across[0] ? (lone ? 18 : 34) : 2];
  const label = (x, y, text, kind) => shape("text", { x, y, class: kind }, text);
  const marks = [];
  if (across[0]) marks.push(label(left, 9, `${across[0]} ${across[1]} \u2192`, "axis"));
  if (down[0]) marks.push(shape("text", { class: "axis", transform: `translate(8 ${top}) rotate(-90)`, "text-anchor": "end" }, `\u2190 ${down[0]} ${down[1]}`));
  if (across[0] && !lone) columns.forEach((x, i) => marks.push(label(left + (i + 0.5) * width, 26, x === GAP ? "\u22ef" : x, "index")));
  rows.forEach((y, j) => (down[0] || lone) && marks.push(label(left - 9, top + (j + 0.5) * height, y === GAP ? "\u22ee" : lone ? 8 * y : y, "index")));
  rows.forEach((y, j) => columns.forEach((x, i) => {
    const index = lone ? 8 * y + x : x;
    if (x === GAP || y === GAP || index >= across[1]) return;
    const place = { ...at, [across[0]]: index, [down[0]]: lone ? 0 : y };
    const [px, py] = [left + i * width, top + j * height];
    const cell = { place, number: numberOf(place), rect: shape("rect", { x: px, y: py, width, height, rx: 4, "data-cell": cells.length }),
      text: width >= 30 ? shape("text", { x: px + width / 2, y: py + height / 2 + 0.5 }) : null };
    cells.push(cell);
    marks.push(cell.rect, cell.text);
  }));
  const letters = (axis) => (axis[0] ? 7 * `${axis[0]} ${axis[1]} \u2192`.length : 0); // as wide as its name needs
  const size = { width: left + Math.max(columns.length * width, letters(across)) + 2, height: top + Math.max(rows.length * height, letters(down)) + 2 };
  return shape("svg", { ...size, "aria-hidden": "true" }, marks);
}

// Which block of each dim a device holds, [index, of], by the axes of a spec.
const blocks = (spec, place) => spec.map((axes) => axes.reduce(([index, of], axis) =>
  [index * found.mesh[axis] + (place[axis] || 0), of * found.mesh[axis]], [0, 1]));
const partOf = (spec, place) => blocks(spec, place).reduce((number, [index, of]) => number * of + index, 0);

// Parts go from violet over blue to green: amber is for what is whole.
const shadeOf = (part, parts) => 0.4 + (0.42 * part) / Math.max(parts - 1, 1);
const shade = (part, parts) =>
  `oklch(${shadeOf(part, parts).toFixed(3)} 0.13 ${(296 - (140 * part) / Math.max(parts - 1, 1)).toFixed(1)})`;

const drawing = { cells: [], here: -1, leaf: null, layout: null };
function mesh() {
  const plan = arranged();
  const figures = plan.shown.map((at) => (at === null ? el("span", { class: "gap", "aria-hidden": "true" }, "\u22ef") : el("figure", {},
    plan.outer.length ? el("figcaption", {}, plan.outer.map(([axis]) => `${axis} ${at[axis]}`).join(", ")) : null, panel(plan, at, drawing.cells))));
  const axes = AXES.map(([axis, size]) => `${axis} ${size}`).join(" \u00d7 ");
  drawing.box = el("div", { class: "planes", id: "mesh-planes", tabindex: "0", role: "img",
    "aria-label": `Mesh of ${plural(DEVICES, "device")}: ${axes}; arrow keys go from device to device` }, figures);
  drawing.readout = el("p", { class: "readout", role: "status", id: "mesh-readout" });
  const drawn = drawing.cells.length;
  const some = drawn < DEVICES ? `${whole(drawn)} of ${whole(DEVICES)} devices are drawn; \u22ef stands for the others.` : "";
  const ones = AXES.filter(([, size]) => size === 1).map(([axis]) => axis);
  const single = ones.length ? `Not drawn, as ${ones.length > 1 ? "they have" : "it has"} one part: ${ones.join(", ")}.` : "";
  into("mesh-title", el("small", {}, axes));
  into("mesh", drawing.box, drawing.readout, some || single ? el("p", { class: "note", id: "mesh-note" }, [some, single].filter(Boolean).join(" ")) : null);
  drawing.box.addEventListener("pointerover", (event) => pointAt(event.target.dataset.cell === undefined ? -1 : Number(event.target.dataset.cell)));
  drawing.box.addEventListener("pointerleave", () => pointAt(-1));
  drawing.box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") pointAt(-1);
    if (!step) return;
    event.preventDefault();
    pointAt((drawing.here + step + drawn) % drawn);
  });
  paint(null, null);
}

// Colours the devices by the part of a leaf that each holds; equal colours hold the same part.
function paint(leaf, layout) {
  Object.assign(drawing, { leaf, layout });
  for (const cell of drawing.cells) {
    const part = layout ? partOf(layout.spec, cell.place) : 0;
    const split = layout && layout.parts > 1;
    cell.rect.setAttribute("class", !layout ? "plain" : split ? "" : "is-whole");
    cell.rect.setAttribute("fill", split ? shade(part, layout.parts) : "");
    if (!cell.text) continue;
    cell.text.textContent = !layout ? cell.number : split ? part : "";
    cell.text.setAttribute("class", split ? "" : "number");
    cell.text.setAttribute("fill", split ? shadeOf(part, layout.parts) > 0.6 ? "#101522" : "#fff" : "");
  }
  pointAt(-1);
}
function pointAt(index) {
  if (drawing.here >= 0) drawing.cells[drawing.here].rect.classList.remove("here");
  drawing.here = index;
  const { leaf, layout } = drawing;
  drawing.box.classList.toggle("picked", index >= 0);
  if (index < 0) {
    drawing.readout.textContent = layout ? `${leaf.path}: ${spread(layout)}.${layout.parts > 1 ? " Devices of one colour hold the same part." : ""}`
      : "Numbers count the devices in the mesh's order. Point at a leaf to see which part of it each device holds.";
    return;
  }
  const { place, number, rect } = drawing.cells[index];
  rect.classList.add("here");
  const mine = layout ? partOf(layout.spec, place) : 0;
  for (const cell of drawing.cells) cell.rect.classList.toggle("group", layout ? partOf(layout.spec, cell.place) === mine : cell.number === number);
  const at = AXES.map(([axis, size]) => `${axis} ${place[axis] || 0} of ${size}`).join(", ");
  const cut = layout ? blocks(layout.spec, place).map(([block, of], dim) => of > 1 &&
    `${(leaf.dims && leaf.dims[dim]) || `dim ${dim}`}[${(block * leaf.shape[dim]) / of}:${((block + 1) * leaf.shape[dim]) / of}]`).filter(Boolean) : [];
  const holds = !layout ? "" : cut.length ? ` It holds ${cut.join(", ")} of ${leaf.path}.` : ` It holds all of ${leaf.path}.`;
  drawing.readout.textContent = `Device ${number}: ${at}.${holds}`;
}

