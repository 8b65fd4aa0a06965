// Draws sharding decisions from the JSON document in the page: totals, leaves, and one leaf in full.
// The mesh is drawn by mesh_drawing.js, which stands before this in the page.

const found = held("decisions-data");
const AXES = Object.entries(found.mesh); // [name, size], slowest link first
const DEVICES = AXES.reduce((product, [, size]) => product * size, 1);
const ROW = 52; // height of a leaf's row in pixels, as the style sheet has it
const SPARE = 8; // rows kept ready on each side of those in sight
const plural = (number, word, many = `${word}s`) => `${whole(number)} ${number === 1 ? word : many}`;

// ---- layouts: how they are written, and their colours ---------------------------------------

// (·, fsdp, data+tensor): the axes that split each dim; trailing whole dims are left out.
const written = (spec) =>
  spec.length ? `(${spec.map((axes) => (axes.length ? axes.join("+") : "\u00b7")).join(", ")})` : "whole";

// A layout's key is the axes that really split it, in mesh order; an axis of one splits nothing.
function keyOf(spec) {
  const used = new Set(spec.flat());
  return AXES.filter(([axis, size]) => size > 1 && used.has(axis)).map(([axis]) => axis).join("+");
}
for (const layout of found.layouts) {
  layout.text = written(layout.spec);
  layout.key = keyOf(layout.spec);
  layout.parts = layout.key ? layout.key.split("+").reduce((product, axis) => product * found.mesh[axis], 1) : 1;
}

// Hues far from amber, which is for what every device holds whole.
const HUES = [258, 178, 312, 142, 352, 222, 285, 115, 200, 335, 160, 240];
const KEYS = [...new Set(found.layouts.map((layout) => layout.key))].sort((a, b) =>
  !a - !b || a.split("+").length - b.split("+").length || inOrder(a, b));
function tinted(node, key) {
  const index = KEYS.indexOf(key);
  if (key) node.style.setProperty("--hue", index < HUES.length ? HUES[index] : 105 + ((index * 47) % 270));
  node.classList.add("tint");
  node.classList.toggle("is-whole", !key);
  return node;
}
const key = (layout) => tinted(el("i", { class: "key" }), layout.key);
const chip = (layout) => tinted(el("span", { class: "chip" }, layout.text), layout.key);
const spread = (layout) => {
  const copies = DEVICES / layout.parts;
  if (DEVICES === 1) return "on the only device";
  if (layout.parts === 1) return `whole on each of ${whole(DEVICES)} devices`;
  return `${whole(layout.parts)} parts, ${copies === 1 ? "each on one device" : `each on ${whole(copies)} devices`}`;
};

// ---- the head and the totals ----------------------------------------------------------------

function head() {
  const [first] = found.groups;
  const elements = first ? first.leaves.reduce((sum, leaf) => sum + leaf.shape.reduce((a, b) => a * b, 1), 0) : 0;
  into("name", found.title);
  const mesh = AXES.map(([axis, size]) => `${axis}=${size}`).join(", ");
  into("subject", found.topology ? ["on ", el("code", {}, found.topology), ", "] : null, "mesh ", el("code", {}, mesh),
    `, ${plural(DEVICES, "device")}`, first ? `; ${plural(elements, "element")} in ${plural(first.leaves.length, "leaf", "leaves")}` : null);
  into("schema", "Schema ", el("code", {}, found.schema), ".");
  offer(found, "decisions.json");
}

// Bytes a device of each table, by the axes that split them: [[key, bytes], ...], as KEYS are.
function byKey(group, column) {
  const sums = new Map(KEYS.map((name) => [name, 0]));
  for (const leaf of group.leaves) {
    const layout = layoutAt(leaf, column);
    if (!layout) continue; // this table is not about the leaf
    const name = layout.key;
    sums.set(name, sums.get(name) + leaf.bytes_per_device[column]);
  }
  return [...sums].filter(([, size]) => size > 0);
}
const called = (name) => name || (DEVICES === 1 ? "one device" : "whole");
function totals() {
  if (!found.tables.length) return into("totals", el("p", { class: "note" }, "No decisions were given."));
  const most = Math.max(1, ...found.tables.map((table) => table.bytes_per_device));
  const rows = found.groups.flatMap((group) => group.tables.map((index, column) => {
    const table = found.tables[index];
    const parts = byKey(group, column);
    const said = parts.map(([name, size]) => `${called(name)} ${bytes(size)}`).join(", ");
    const bar = el("div", { class: "stack", role: "img", "aria-label": `a device: ${said || "nothing"}` }, parts.map(([name, size]) =>
      tinted(el("i", { "width%": (100 * size) / most, title: `${called(name)}: ${bytes(size)} a device` }), name)));
    return el("li", { "data-table": table.name }, el("p", { class: "line" },
      el("b", {}, table.name), el("span", { class: "soft grow" }, plural(table.leaves, "leaf", "leaves")),
      el("b", { class: "num", "data-value": table.bytes_per_device }, `${bytes(table.bytes_per_device)} a device`),
      el("span", { class: "num soft", "data-value": table.bytes }, `of ${bytes(table.bytes)}`)), bar);
  }));
  into("totals", el("ul", { class: "totals" }, rows));
  if (found.groups.some((group) => group.tables.length > 1)) into("totals", el("p", { class: "note" },
    `${found.groups.map((group) => group.tables.map((index) => found.tables[index].name)).filter((names) => names.length > 1).map((names) => names.join(", ")).join("; ")}: layouts of the same leaves, so their bytes do not add up.`));
  if (found.holds.length) into("totals", el("h3", {}, "Together, a device holds"), el("dl", { class: "facts", id: "holds" }, found.holds.map((part) =>
    [el("dt", {}, part.name), el("dd", { "data-value": part.bytes }, el("b", {}, bytes(part.bytes)), el("span", { class: "soft" }, part.what))])));
}

// ---- one leaf -------------------------------------------------------------------------------

const sized = (shape_) => shape_.join("\u00d7") || "scalar";
const named = (dims) => (dims ? `(${dims.map((dim) => dim || "\u00b7").join(", ")})` : "undeclared");
// The layout that a table of the leaf's group gives it, by the table's position; null if none.
const layoutAt = (leaf, position) => (known(leaf.layouts[position]) ? found.layouts[leaf.layouts[position]] : null);
const layoutsOf = (leaf) => leaf.layouts.filter(known).map((index) => found.layouts[index]);
const whyOf = (layout) => (layout.spec.length ? layout.rule : layout.reason);

// The leaves of the other groups whose paths end with a leaf's path: its moments, as a rule.
let kin = null;
function related(leaf) {
  const [first, ...others] = found.groups;
  if (!kin) {
    const byPath = new Map(first.leaves.map((one) => [one.path, []]));
    for (const group of others) for (const one of group.leaves) {
      const names = one.path.split("/");
      for (let start = 0; start < names.length; start++) {
        const owner = byPath.get(names.slice(start).join("/"));
        if (!owner) continue;
        owner.push(one);
        break;
      }
    }
    kin = new Map(first.leaves.map((one) => [one, byPath.get(one.path)]));
  }
  return kin.get(leaf) || [];
}

function detail(group, leaf, column) {
  const box = document.getElementById("leaf");
  document.getElementById("leaf-card").classList.toggle("empty", !leaf);
  if (!leaf) return box.replaceChildren(el("p", { class: "note" }, "Point at a leaf, tap it, or go from leaf to leaf with the arrow keys."));
  const same = new Map(); // tables that say the same are told once
  group.tables.forEach((table, position) => {
    const layout = layoutAt(leaf, position);
    if (layout) same.set(layout, [...(same.get(layout) || []), position]);
  });
  const drawn = layoutAt(leaf, column);
  const told = [...same].map(([layout, positions]) => tinted(
    el("div", { class: `told${layout === drawn && same.size > 1 ? " drawn" : ""}` },
      el("p", { class: "for" }, positions.map((position) => found.tables[group.tables[position]].name).join(", ")),
      el("p", { class: "pair" }, chip(layout), el("b", { class: "num", "data-fact": "device" }, `${bytes(leaf.bytes_per_device[positions[0]])} a device`)),
      el("dl", { class: "facts" }, [["rule", layout.rule], ["reason", layout.reason], ["spread", spread(layout)]].map(([name, said]) =>
        [el("dt", {}, name), el("dd", { "data-fact": name }, said)]))), layout.key));
  const pieces = leaf.shape.map((size, dim) => {
    const axes = drawn.spec[dim] || [];
    const parts = axes.reduce((product, axis) => product * found.mesh[axis], 1);
    return el("tr", {}, el("td", {}, (leaf.dims && leaf.dims[dim]) || el("span", { class: "soft" }, `dim ${dim}`)), el("td", { class: "num" }, whole(size)),
      el("td", { class: "soft" }, axes.length ? `\u00f7 ${axes.map((axis) => `${axis} ${found.mesh[axis]}`).join(" \u00d7 ")}` : ""), el("td", { class: "num" }, whole(size / parts)));
  });
  const heads = [["dim"], ["size", "num"], ["split over"], ["a device", "num"]].map(([name, kind]) => el("th", { scope: "col", class: kind }, name));
  const kinds = related(leaf).map((one) => [el("dt", {}, chip(layoutsOf(one)[0]), bytes(one.bytes_per_device.find(known))), el("dd", { class: "mono" }, one.path)]);
  box.replaceChildren(
    el("p", { class: "path mono" }, leaf.path),
    el("dl", { class: "facts" }, el("dt", {}, "dims"), el("dd", { "data-fact": "dims" }, named(leaf.dims)), el("dt", {}, "shape"),
      el("dd", { "data-fact": "shape" }, sized(leaf.shape)), el("dt", {}, "type"), el("dd", { "data-fact": "dtype" }, leaf.dtype),
      el("dt", {}, "global"), el("dd", { "data-fact": "bytes" }, bytes(leaf.bytes))), ...told);
  if (pieces.length) box.append(el("table", { class: "plain pieces", "aria-label": "Dims" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, pieces)));
  if (kinds.length) box.append(el("h3", {}, "Elsewhere under this path"), el("dl", { class: "kin" }, kinds));
}

// ---- the leaves -----------------------------------------------------------------------------

// Tables of a group whose specs agree, on every leaf that both are about, share a column.
function columnsOf(group) {
  const columns = [];
  group.tables.forEach((table, position) => {
    const agrees = (column) => group.leaves.every((leaf) => {
      const [mine, theirs] = [layoutAt(leaf, position), layoutAt(leaf, positionIn(leaf, column))];
      return !mine || !theirs || mine.text === theirs.text;
    });
    const twin = columns.find(agrees);
    if (twin) twin.positions.push(position);
    else columns.push({ positions: [position] });
  });
  for (const column of columns) column.label = column.positions.map((position) => found.tables[group.tables[position]].name).join(", ");
  return columns;
}
// The table of a column that is about a leaf, by position; undefined if none is.
const positionIn = (leaf, column) => column.positions.find((position) => known(leaf.layouts[position]));
const positionsOf = (group, leaf) => group.columns.map((column) => positionIn(leaf, column)).filter(known);
// Why a row is as it is: the first layout that splits the leaf says so, else the last.
function deciding(group, leaf) {
  const layouts = positionsOf(group, leaf).map((position) => layoutAt(leaf, position));
  return layouts.find((layout) => layout.spec.length) || layoutsOf(leaf).pop();
}

// {key, label, value(leaf) for sorting, numeric}; each is a heading that sorts.
function headingsOf(group) {
  return [
    { key: "path", label: "leaf", value: (leaf) => leaf.path },
    { key: "why", label: "why", value: (leaf) => whyOf(deciding(group, leaf)) },
    { key: "shape", label: "shape", value: (leaf) => sized(leaf.shape) },
    { key: "dims", label: "dims", value: (leaf) => named(leaf.dims) },
    ...group.columns.flatMap((column) => [
      { key: `layout-${column.positions[0]}`, label: group.columns.length > 1 ? column.label : "layout", value: (leaf) => layoutAt(leaf, positionIn(leaf, column))?.text ?? "" },
      { key: `device-${column.positions[0]}`, label: "a device", value: (leaf) => leaf.bytes_per_device[positionIn(leaf, column)] ?? -1, numeric: true },
    ]),
    { key: "bytes", label: "global", value: (leaf) => leaf.bytes, numeric: true },
    { key: "dtype", label: "type", value: (leaf) => leaf.dtype },
  ];
}

// A table of leaves that has elements only for the rows in sight.
class Leaves {
  constructor(group, number) {
    Object.assign(this, { group, shown: group.leaves, sorted: null, active: 0, rows: new Map() });
    this.most = group.leaves.reduce((most, leaf) => Math.max(most, ...leaf.bytes_per_device), 1);
    this.headings = headingsOf(group);
    this.heads = this.headings.map((heading) => el("div", { role: "columnheader", "data-key": heading.key, "aria-sort": "none" },
      el("button", { type: "button", onclick: () => this.sort(heading) }, heading.label)));
    const names = group.columns.map((column) => column.label).join(", ");
    this.body = el("div", { class: "body", role: "rowgroup" });
    this.top = el("div", { class: "heads", role: "row" }, this.heads);
    this.grid = el("div", { class: "grid", role: "grid", id: `grid-${number}`, "aria-label": `Leaves of ${names}` }, this.top, this.body);
    this.grid.style.setProperty("--layouts", group.columns.length);
    group.columns.forEach((column, i) => this.headings.forEach(({ key: name }, index) =>
      /^(layout|device)-/.test(name) && name.endsWith(`-${column.positions[0]}`) && this.heads[index].style.setProperty("--at", i + 3)));
    this.empty = el("p", { class: "note none" }, "No leaf is like that.");
    this.node = el("div", {}, this.grid, this.empty);
    this.grid.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.grid);
    this.body.addEventListener("pointerover", (event) => this.hover(event));
    this.body.addEventListener("pointerleave", () => pick(pinned));
    this.body.addEventListener("click", (event) => this.tap(event));
    this.body.addEventListener("keydown", (event) => this.press(event));
    this.body.addEventListener("focusin", (event) => this.focused(event));
    this.show(group.leaves);
  }
  show(leaves) {
    this.chosen = leaves;
    this.shown = this.sorted ? this.ordered(leaves) : leaves;
    this.active = 0;
    this.grid.scrollTop = 0;
    this.refresh();
  }
  ordered(leaves) {
    const { heading, down } = this.sorted;
    const valued = leaves.map((leaf) => [heading.value(leaf), leaf]);
    valued.sort(([a], [b]) => (heading.numeric ? a - b : inOrder(a, b)) * (down ? -1 : 1));
    return valued.map(([, leaf]) => leaf);
  }
  // First click sorts, the largest bytes first; the second turns round; the third is as given.
  sort(heading) {
    const again = this.sorted && this.sorted.heading === heading;
    const first = Boolean(heading.numeric);
    if (!again) this.sorted = { heading, down: first };
    else if (this.sorted.down === first) this.sorted = { heading, down: !first };
    else this.sorted = null;
    this.headings.forEach((one, index) => this.heads[index].setAttribute("aria-sort",
      !this.sorted || this.sorted.heading !== one ? "none" : this.sorted.down ? "descending" : "ascending"));
    this.show(this.chosen);
  }
  refresh() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.body.style.height = `${this.shown.length * ROW}px`;
    this.grid.setAttribute("aria-rowcount", this.shown.length + 1);
    this.grid.hidden = !this.shown.length;
    this.empty.hidden = Boolean(this.shown.length);
    this.draw();
  }
  draw() {
    const from = Math.max(0, Math.floor(this.grid.scrollTop / ROW) - SPARE);
    const to = Math.min(this.shown.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / ROW) + SPARE);
    for (const [index, row] of this.rows) {
      // The row that has or would get the focus stays, or the keyboard would lose its place.
      if ((index >= from && index < to) || index === this.active) continue;
      row.remove();
      this.rows.delete(index);
    }
    for (let index = from; index < to; index++) this.rowAt(index);
    if (this.active < this.shown.length) this.rowAt(this.active);
  }
  rowAt(index) {
    if (this.rows.has(index)) return this.rows.get(index);
    const leaf = this.shown[index];
    const cut = leaf.path.lastIndexOf("/") + 1;
    const cell = (kind, ...children) => el("div", { role: "gridcell", class: kind }, children);
    const [first] = layoutsOf(leaf);
    const row = el("div", { role: "row", class: "row", tabindex: index === this.active ? 0 : -1, "data-index": index, "data-path": leaf.path,
      "data-key": first.key || "whole", "aria-rowindex": index + 2 },
      cell("path mono", key(first), el("span", { class: "trunk" }, leaf.path.slice(0, cut)), el("span", { class: "tip" }, leaf.path.slice(cut) || "(root)")),
      cell("why", whyOf(deciding(this.group, leaf))), cell("shape", sized(leaf.shape)), cell("dims", named(leaf.dims)),
      this.group.columns.map((column, i) => {
        const position = positionIn(leaf, column);
        const layout = layoutAt(leaf, position);
        const at = (node) => { node.style.setProperty("--at", i + 3); if (layout) node.dataset.position = position; return node; };
        if (!layout) return at(cell("layout soft", "none"));
        const share = el("i", { class: "share", "width%": (100 * leaf.bytes_per_device[position]) / this.most });
        return [at(cell("layout", chip(layout))), at(cell("device", el("span", { class: "num" }, bytes(leaf.bytes_per_device[position])), tinted(el("span", { class: "track" }, share), layout.key)))];
      }), cell("bytes num", bytes(leaf.bytes)), cell("dtype", leaf.dtype));
    row.style.top = `${index * ROW}px`;
    // Rows stand in the order of the leaves, so that a screen reader meets them so.
    const after = [...this.rows.entries()].filter(([other]) => other > index).sort(([a], [b]) => a - b)[0];
    this.body.insertBefore(row, after ? after[1] : null);
    this.rows.set(index, row);
    if (pinned && pinned.leaf === leaf) row.classList.add("pinned");
    return row;
  }
  at(event) {
    const row = event.target.closest(".row");
    if (!row) return null;
    const cell = event.target.closest("[data-position]");
    const index = Number(row.dataset.index);
    const leaf = this.shown[index];
    return { index, table: this, leaf, position: cell ? Number(cell.dataset.position) : positionsOf(this.group, leaf)[0] };
  }
  hover(event) {
    const place = this.at(event);
    if (place && event.pointerType !== "touch") pick(place);
  }
  tap(event) {
    const place = this.at(event);
    if (!place) return;
    this.go(place.index);
    pin(place);
  }
  focused(event) {
    const place = this.at(event);
    if (!place) return;
    event.target.setAttribute("aria-describedby", "leaf");
    if (!pinned || pinned.leaf !== place.leaf) pin(place);
  }
  press(event) {
    const page = Math.max(1, Math.floor(this.grid.clientHeight / ROW) - 2);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.shown.length, End: this.shown.length }[event.key];
    const side = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined && side === undefined) return;
    event.preventDefault();
    if (step !== undefined) return this.go(Math.min(this.shown.length - 1, Math.max(0, this.active + step)));
    const leaf = this.shown[this.active];
    const positions = positionsOf(this.group, leaf);
    const next = positions[positions.indexOf(pinned ? pinned.position : positions[0]) + side];
    if (next !== undefined) pin({ table: this, index: this.active, leaf, position: next });
  }
  // Moves the focus to a row, and the row into sight.
  go(index) {
    const old = this.rows.get(this.active);
    if (old) old.tabIndex = -1;
    this.active = index;
    const height = this.grid.clientHeight - this.top.offsetHeight;
    if (index * ROW < this.grid.scrollTop) this.grid.scrollTop = index * ROW;
    else if ((index + 1) * ROW > this.grid.scrollTop + height) this.grid.scrollTop = (index + 1) * ROW - height;
    this.draw();
    const row = this.rowAt(index);
    row.tabIndex = 0;
    row.focus({ preventScroll: true });
  }
}

// What the page shows in full: the leaf pointed at, else the one that was tapped or focused.
let pinned = null;
let picked = null;
function pick(place) {
  if (!place || (picked && picked.leaf === place.leaf && picked.position === place.position)) return;
  picked = place;
  detail(place.table.group, place.leaf, place.position);
  paint(place.leaf, layoutAt(place.leaf, place.position));
}
function pin(place) {
  const mark = (on) => pinned && pinned.table.rows.get(pinned.table.shown.indexOf(pinned.leaf))?.classList.toggle("pinned", on);
  mark(false);
  pinned = place;
  mark(true);
  pick(place);
}

// ---- search and legend ----------------------------------------------------------------------

function haystacks(group) {
  return group.leaves.map((leaf) => {
    const layouts = layoutsOf(leaf);
    const parts = { path: leaf.path, dim: named(leaf.dims), spec: [...new Set(layouts.map((layout) => layout.text))].join(" "), shape: sized(leaf.shape), type: leaf.dtype };
    for (const name of Object.keys(parts)) parts[name] = parts[name].toLowerCase();
    parts.all = Object.values(parts).join("\n");
    return { parts, keys: new Set(layouts.map((layout) => layout.key)) };
  });
}
// Words, each of which must be there: anywhere, or where `path:`, `dim:`, `spec:` ... say.
function wanted(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [, field, rest] = /^(path|dim|spec|shape|type):(.+)$/.exec(word) || [null, "all", word];
    return ({ parts }) => parts[field].includes(rest);
  });
}

function leaves() {
  const text = el("input", { type: "search", id: "search", placeholder: "path, dim or spec \u2026 or dim:embed, spec:fsdp, path:attn", autocomplete: "off", spellcheck: "false", "aria-label": "Search by path, dim or spec" });
  const chosen = new Set();
  const counts = new Map(KEYS.map((name) => [name, 0]));
  for (const group of found.groups) for (const leaf of group.leaves)
    for (const name of new Set(layoutsOf(leaf).map((layout) => layout.key))) counts.set(name, counts.get(name) + 1);
  const legend = KEYS.map((name) => {
    const button = el("button", { type: "button", class: "key-button", "aria-pressed": "false", "data-key": name || "whole" }, tinted(el("i", { class: "key" }), name), el("b", {}, called(name)),
      el("span", {}, plural(counts.get(name), "leaf", "leaves")));
    button.addEventListener("click", () => {
      if (!chosen.delete(name)) chosen.add(name);
      button.setAttribute("aria-pressed", String(chosen.has(name)));
      filter();
    });
    return tinted(button, name);
  });
  const parts = found.groups.filter((group) => group.leaves.length).map((group, number) => {
    group.columns = columnsOf(group);
    const name = group.tables.map((index) => found.tables[index].name).join(", ");
    const said = el("span", { class: "count", role: "status" });
    const box = el("details", { class: "group", "data-group": name, ...(number ? {} : { open: "" }) }, el("summary", {}, el("b", {}, name), said));
    const part = { group, said, box, table: null, chosen: group.leaves, hay: null };
    const open = () => {
      if (part.table || !box.open) return;
      part.table = new Leaves(group, number);
      box.append(part.table.node);
      part.table.show(part.chosen);
    };
    box.addEventListener("toggle", open);
    part.open = open;
    return part;
  });
  function filter() {
    const words = wanted(text.value);
    for (const part of parts) {
      part.hay = part.hay || haystacks(part.group);
      part.chosen = !words.length && !chosen.size ? part.group.leaves : part.group.leaves.filter((leaf, index) => {
        const hay = part.hay[index];
        return words.every((word) => word(hay)) && (!chosen.size || [...chosen].some((name) => hay.keys.has(name)));
      });
      part.said.textContent = part.chosen.length === part.group.leaves.length ? plural(part.chosen.length, "leaf", "leaves")
        : `${whole(part.chosen.length)} of ${plural(part.group.leaves.length, "leaf", "leaves")}`;
      part.said.dataset.rows = part.chosen.length;
      if (part.table) part.table.show(part.chosen);
    }
  }
  text.addEventListener("input", filter);
  into("tools", text, el("div", { class: "keys", role: "group", "aria-label": "Colours: the mesh axes that split a leaf; press to show those leaves only" }, legend));
  into("groups", parts.map((part) => part.box));
  for (const part of parts) part.open();
  filter();
}

head();
totals();
mesh();
detail(null, null, 0);
leaves();
document.documentElement.dataset.ready = "yes";
