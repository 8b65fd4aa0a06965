// Draws a plan from the JSON document in the page.

const plan = held("plan-data");
const layout = held("plan-layout");
const PARTS = ["parameters", "gradients", "optimizer", "batch", "activations", "temporaries"];
const AT_ONCE = 400; // rows of a table before a reader asks for more

// ---- quantities -----------------------------------------------------------------------------

const digits = (value) => value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
function seconds(value) {
  if (!known(value)) return "unknown";
  if (value === 0) return "0 s";
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3]]) if (value >= scale * 0.9995) return `${digits(value / scale)} ${unit}`;
  return `${digits(value / 1e-6)} \u00b5s`;
}
function count(value, unit = "") {
  if (!known(value)) return "unknown";
  for (const [prefix, scale] of [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (value >= scale * 0.9995) return `${digits(value / scale)} ${prefix}${unit}`;
  return `${+digits(value)}${unit && " " + unit}`;
}
const percent = (value) => (value > 0 && value < 0.005 ? "<1%" : `${Math.round(value * 100)}%`);
const span = (pair, write) => (known(pair) ? [pair[1], pair[0]].map(write).filter((s, i, all) => !i || s !== all[0]).join(" \u2013 ") : "unknown");

function originOf(figure) {
  for (let key = figure; key; key = key.slice(0, Math.max(0, key.lastIndexOf("."))))
    if (key !== "unread" && key !== "notes" && Object.hasOwn(plan.provenance, key)) return plan.provenance[key];
  return null;
}
function origin(figure, made = originOf(figure)) {
  if (!made) return null;
  return el("span", { class: `origin ${made.origin === "data sheet" ? "sheet" : made.origin}`, title: made.how }, made.origin);
}

// ---- tables ---------------------------------------------------------------------------------

// columns: {key, label, value(row) for sorting, cell(row) -> text or node, numeric, mono}.
function sortable(columns, rows, label, started) {
  let sorted = { column: columns.find((column) => column.key === started), down: true };
  let shown = rows;
  let all = false;
  const body = el("tbody");
  const headings = columns.map((column) => {
    const button = el("button", { type: "button", onclick: () => sort(column) }, column.label);
    return el("th", { scope: "col", class: column.numeric && "num", "data-key": column.key }, button);
  });
  const more = el("button", { type: "button", class: "act", hidden: "", onclick: () => { all = true; draw(); } });
  function compare(a, b) {
    const [left, right] = [sorted.column.value(a), sorted.column.value(b)];
    if (!known(left) || !known(right)) return known(right) - known(left); // the unknown go last
    const order = typeof left === "number" ? left - right : inOrder(String(left), String(right));
    return sorted.down ? -order : order;
  }
  function draw() {
    if (sorted.column) shown = [...shown].sort(compare);
    headings.forEach((heading, index) => heading.setAttribute("aria-sort",
      columns[index] !== sorted.column ? "none" : sorted.down ? "descending" : "ascending"));
    body.replaceChildren(...shown.slice(0, all ? undefined : AT_ONCE).map((row) => el("tr", {}, columns.map((column, index) => {
      const value = column.value(row);
      const kind = [column.numeric && "num", column.mono && "mono"].filter(Boolean).join(" ");
      const attributes = { class: kind || null, "data-key": column.key, "data-value": known(value) ? value : "" };
      if (!index) attributes.scope = "row";
      return el("td", attributes, column.cell ? column.cell(row) : String(known(value) ? value : ""));
    }))));
    more.hidden = all || shown.length <= AT_ONCE;
    more.textContent = `Show all ${whole(shown.length)} rows`;
  }
  function sort(column) {
    sorted = { column, down: sorted.column === column ? !sorted.down : Boolean(column.numeric) };
    draw();
  }
  draw();
  const table = el("table", { "aria-label": label }, el("thead", {}, el("tr", {}, headings)), body);
  const box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
  return { nodes: [box, el("p", { class: "note" }, more)], show: (chosen) => { shown = chosen; draw(); } };
}

// ---- the head and the tiles -----------------------------------------------------------------

function head() {
  const mesh = Object.entries(plan.mesh).map(([axis, size]) => `${axis}=${size}`).join(", ");
  const devices = Object.values(plan.mesh).reduce((a, b) => a * b, 1);
  const parameters = plan.model.parameters;
  into("name", String(plan.model.name || "A step"));
  into("subject", "on ", el("code", {}, plan.topology), ", mesh ", el("code", {}, mesh || "none"),
    `, ${whole(devices)} device${devices === 1 ? "" : "s"}`,
    typeof parameters === "number" ? `, ${whole(parameters)} parameters` : "");
  const { peak_bytes: peak, limit_bytes: limit } = plan.memory;
  const [word, kind] = plan.fits === null ? ["No verdict", ""] : plan.fits ? ["Fits", "fits"] : ["Does not fit", "over"];
  const said = plan.fits === null
    ? `${!known(peak) ? "the peak" : "the limit"} ${!known(peak) && !known(limit) ? "and the limit are" : "is"} not known`
    : `${bytes(peak)} of ${bytes(limit)} a device, ${plan.fits ? `${bytes(limit - peak)} to spare` : `over by ${bytes(peak - limit)}`}`;
  const verdict = into("verdict", el("b", {}, word), el("span", { id: "verdict-text" }, said), origin("memory.peak_bytes"));
  if (kind) verdict.classList.add(kind);
  into("schema", "Schema ", el("code", {}, plan.schema), ".");
  offer(plan, "plan.json");
}

function tiles() {
  const { time, traffic } = plan;
  const ratios = Object.entries(traffic).filter(([, moved]) => known(moved.ratio)).sort((a, b) => b[1].ratio - a[1].ratio);
  const sent = Object.values(traffic).reduce((sum, moved) => sum + moved.wire_bytes, 0);
  const checked = time.validated ? "measured on this hardware" : "unvalidated";
  const steps = known(time.step_seconds_low) || known(time.step_seconds_high);
  const tile = (name, value, note) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value), el("dd", { class: "sub" }, el("p", {}, note)));
  into("tiles", el("dl", {},
    tile("Step time", steps ? span([time.step_seconds_high, time.step_seconds_low], seconds) : "unknown", steps ? `full overlap to none, ${checked}` : "no chip, no rates"),
    tile("Model FLOP utilisation", known(time.mfu) ? `${span(time.mfu, (value) => (value * 100).toFixed(1))}%` : "unknown", known(time.peak_flops) ? `of ${count(time.peak_flops, "FLOP/s")}, ${checked}` : ""),
    tile("Tokens a second, a chip", span(time.tokens_per_second_per_chip, whole), known(time.tokens_per_second_per_chip) ? checked : ""),
    tile("Bound by", time.bound_by || "unknown", ""),
    tile("Sent by a device", Object.keys(traffic).length ? bytes(sent) : "unknown", ratios.length ? `${ratios[0][1].ratio.toFixed(3)}\u00d7 the least, on ${ratios[0][0]}` : "no bound known")));
}

// ---- memory ---------------------------------------------------------------------------------

function memory() {
  const m = plan.memory;
  const sizes = PARTS.map((name) => [name, m[`${name}_bytes`]]);
  const sum = sizes.reduce((total, [, size]) => total + size, 0);
  const scale = Math.max(sum, m.peak_bytes || 0, m.limit_bytes || 0, 1);
  const mark = (value, kind, words) => known(value) && el("div",
    { class: `mark ${kind}${value / scale > 0.85 ? " end" : ""}`, "left%": (100 * value) / scale }, el("span", {}, words));
  const spoken = sizes.map(([name, size]) => `${name} ${bytes(size)}`).join(", ");
  const bar = el("div", { class: "stack", role: "img", "aria-label": `${spoken}; peak ${bytes(m.peak_bytes)}, limit ${bytes(m.limit_bytes)}` },
    el("div", { class: "track" }, sizes.filter(([, size]) => size > 0).map(([name, size]) =>
      el("div", { class: `part ${name}`, "width%": (100 * size) / scale, title: `${name}: ${bytes(size)}` }))),
    m.limit_bytes && scale > m.limit_bytes ? el("div", { class: "beyond", "left%": (100 * m.limit_bytes) / scale }) : null,
    mark(m.limit_bytes, "limit", `limit ${bytes(m.limit_bytes)}`) || null, mark(m.peak_bytes, "peak", `peak ${bytes(m.peak_bytes)}`) || null);
  const row = (name, size, swatch) => el("tr", {}, el("th", { scope: "row" }, swatch && el("span", { class: `swatch ${name}` }), name),
    el("td", { class: "num", "data-figure": `memory.${name}_bytes` }, bytes(size)),
    el("td", { class: "num" }, known(size) && m.limit_bytes ? percent(size / m.limit_bytes) : ""), el("td", {}, known(size) ? origin(`memory.${name}_bytes`) : null));
  const legend = el("table", { class: "plain", "aria-label": "Memory by part" }, el("tbody", {},
    sizes.map(([name, size]) => row(name, size, true)), row("peak", m.peak_bytes), row("limit", m.limit_bytes)));
  const list = (heading, head, rows) => [el("h3", {}, heading), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heading }, el("table", {},
    el("thead", {}, el("tr", {}, head.map(([name, kind]) => el("th", { scope: "col", class: kind }, el("span", {}, name))))), el("tbody", {}, rows)))];
  const parts = m.contributors.length ? list("Largest contributors", [["what"], ["bytes", "num"]], m.contributors.map((part) =>
    el("tr", {}, el("td", {}, part.what), el("td", { class: "num" }, bytes(part.bytes))))) : [];
  const tried = m.changes.length ? list("Changes tried", [["change"], ["peak", "num"], ["verdict"], ["by"]], m.changes.map((change) =>
    el("tr", {}, el("td", { class: "mono" }, change.flags), el("td", { class: "num" }, bytes(change.peak_bytes)),
      el("td", {}, change.fits ? "fits" : "does not fit"), el("td", {}, origin("", { origin: change.origin, how: "" }))))) : [];
  into("memory", bar, el("div", { class: "columns" }, el("div", {}, legend), el("div", {}, parts, tried)));
}

// ---- traffic and time -----------------------------------------------------------------------

function line(name, value, kind, width, mark, note) {
  return el("div", {}, el("div", { class: "bar-head" }, el("b", {}, name), el("span", { class: "num" }, value)),
    el("div", { class: `bar ${kind}`, role: "img", "aria-label": `${name}: ${value}` },
      el("i", { "width%": width }), known(mark) ? el("i", { class: "bound", "width%": mark }) : null), note ? el("p", { class: "note" }, note) : null);
}
function traffic() {
  const rows = Object.entries(plan.traffic);
  if (!rows.length) return into("traffic", el("p", { class: "note" }, "Not known: nothing was compiled and no closed form applies."));
  const scale = Math.max(...rows.flatMap(([, moved]) => [moved.wire_bytes, moved.lower_bound_bytes || 0]), 1);
  into("traffic", el("div", { class: "bars" }, rows.map(([axis, moved]) => {
    const bound = moved.lower_bound_bytes;
    const ratio = known(moved.ratio) ? `, ${moved.ratio.toFixed(3)}\u00d7 the least` : "";
    const note = [known(bound) ? `at least ${bytes(bound)}` : "no lower bound known",
      known(moved.bandwidth) ? `${count(moved.bandwidth, "B/s")} a device` : "", known(moved.seconds) ? seconds(moved.seconds) : ""].filter(Boolean).join(", ");
    const high = moved.ratio > 1.05 || (bound === 0 && moved.wire_bytes > 0);
    const shown = line(`${axis}${known(plan.mesh[axis]) ? "=" + plan.mesh[axis] : ""}`, bytes(moved.wire_bytes) + ratio, `wire${high ? " high" : ""}`,
      (100 * moved.wire_bytes) / scale, known(bound) ? (100 * bound) / scale : null, note);
    shown.lastChild.append(" ", origin(`traffic.${axis}.wire_bytes`) || "");
    return shown;
  })), el("p", { class: "note" }, "Bars are bytes sent; the upright line is the least that this step has to send."), breakdown());
}
function breakdown() {
  const sums = new Map();
  for (const row of plan.collectives) {
    const key = `${row.kind}, ${row.phase}`;
    sums.set(key, (sums.get(key) || 0) + row.wire_bytes);
  }
  const found = [...sums].sort((a, b) => b[1] - a[1]).slice(0, 8);
  if (!found.length) return null;
  return [el("h3", {}, "Largest by kind and phase"), el("div", { class: "bars small" }, found.map(([key, sent]) =>
    line(key, bytes(sent), "wire", (100 * sent) / Math.max(found[0][1], 1))))];
}
function time() {
  const t = plan.time;
  const moved = Object.entries(t.communication_seconds);
  const values = [t.compute_seconds, t.memory_seconds, t.step_seconds_low, t.step_seconds_high, t.roofline_seconds, ...moved.map(([, value]) => value)].filter(known);
  const scale = Math.max(...values, 1e-12);
  const bars = [];
  const add = (name, value, kind, note, mark) => known(value) && bars.push(line(name, seconds(value), kind, (100 * value) / scale, known(mark) ? (100 * mark) / scale : null, note));
  add("compute", t.compute_seconds, "", known(t.roofline_seconds) ? `roofline ${seconds(t.roofline_seconds)}, the upright line` : "", t.roofline_seconds);
  add("memory", t.memory_seconds, "memory");
  for (const [axis, value] of moved) add(`communication, ${axis}`, value, "wire");
  if (known(t.step_seconds_high)) bars.push(line("step", span([t.step_seconds_high, t.step_seconds_low], seconds), "range",
    (100 * t.step_seconds_high) / scale, known(t.step_seconds_low) ? (100 * t.step_seconds_low) / scale : null, "from full overlap (the upright line) to none"));
  const f = plan.flops;
  const facts = [["FLOPs a device", count(f.device_flops, "FLOP")], ["of the model", count(f.model_flops, "FLOP")],
    ["of the model, causal", count(f.model_flops_causal, "FLOP")], ["redundancy", known(f.redundancy) ? f.redundancy.toFixed(3) : "unknown"],
    ["memory traffic", bytes(f.memory_traffic_bytes)], ["bound by", t.bound_by || "unknown"],
    ["status", t.validated ? "measured on this hardware" : "unvalidated: not measured on this hardware"]];
  into("time", el("div", { class: "bars" }, bars), el("dl", { class: "facts" }, facts.map(([name, said]) => [el("dt", {}, name), el("dd", {}, said)])));
}

// ---- warnings, decisions, provenance --------------------------------------------------------

function warnings() {
  const found = plan.warnings;
  into("warnings-title", ` (${found.length})`);
  if (!found.length) into("warnings", el("p", { class: "note" }, "None."));
  const definition = (name, node) => (node ? [el("dt", {}, name), el("dd", {}, node)] : null);
  into("warnings", found.map((warning) => {
    const costs = [known(warning.cost_bytes) && bytes(warning.cost_bytes), known(warning.cost_seconds) && seconds(warning.cost_seconds)].filter(Boolean).join(", ");
    return el("article", { class: "warning" }, el("h3", {}, warning.code), el("p", {}, warning.what), el("dl", {},
      definition("source", warning.source && el("code", {}, warning.source)), definition("leaf", warning.leaf && el("code", {}, warning.leaf)),
      definition("costs", costs), definition("fix", warning.fix && el("code", {}, warning.fix))));
  }));
}
function written(spec) {
  if (!Array.isArray(spec)) return known(spec) ? String(spec) : "";
  return spec.length ? `(${spec.map((axes) => (axes.length ? [axes].flat().join("+") : "\u00b7")).join(", ")})` : "whole";
}
function decisions() {
  const rows = plan.decisions;
  if (!rows.length) return into("decisions", el("p", { class: "note" }, "None were recorded."));
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.specs || { layout: row.spec })))];
  const spec = (row, kind) => written(row.specs ? row.specs[kind] : row.spec);
  const columns = [{ key: "path", label: "leaf", value: (row) => row.path ?? "", mono: true },
    { key: "shape", label: "shape", value: (row) => [row.shape ?? []].flat().join("\u00d7") },
    { key: "dims", label: "dims", value: (row) => (row.dims ? row.dims.join(", ") : "") },
    ...kinds.map((kind) => ({ key: kind, label: kind, value: (row) => spec(row, kind), mono: true })),
    { key: "why", label: "why", value: (row) => row.rule || row.reason || "" },
    { key: "bytes", label: "a device", value: (row) => row.bytes_per_device ?? null, cell: (row) => bytes(row.bytes_per_device), numeric: true }];
  into("decisions", sortable(columns, rows, "Decisions", null).nodes);
}
function provenance() {
  const { unread, notes, ...figures } = plan.provenance;
  for (const text of notes || []) into("provenance", el("p", {}, el("b", {}, "Note: "), text));
  for (const text of unread) into("provenance", el("p", { class: "alert" }, el("b", {}, "Not read: "), text));
  const rows = Object.entries(figures);
  const columns = [{ key: "figure", label: "figure", value: (row) => row[0], mono: true },
    { key: "origin", label: "origin", value: (row) => row[1].origin, cell: (row) => origin("", row[1]) },
    { key: "how", label: "how", value: (row) => row[1].how }];
  into("provenance", rows.length ? sortable(columns, rows, "Provenance", null).nodes : el("p", { class: "note" }, "Nothing was recorded."));
}

// ---- collectives ----------------------------------------------------------------------------

function collectives() {
  const rows = plan.collectives;
  if (!rows.length) {
    const made = originOf("collectives");
    const why = made && made.origin === "unknown" ? `Not known: ${made.how}.` : "None.";
    return into("collectives", el("p", { class: "note" }, why));
  }
  const most = Math.max(...rows.map((row) => row.wire_bytes), 1);
  const overlap = { true: "yes", false: "no", null: "unknown" };
  const columns = [
    { key: "kind", label: "kind", value: (row) => row.kind },
    { key: "axes", label: "axes", value: (row) => row.axes.join("+"), cell: (row) => row.axes.join("+") + (row.partial ? " (part)" : "") },
    { key: "phase", label: "phase", value: (row) => row.phase, cell: (row) => el("span", { class: `tag ${row.phase}` }, row.phase) },
    { key: "count", label: "times", value: (row) => row.count, cell: (row) => whole(row.count), numeric: true },
    { key: "bytes", label: "buffers", value: (row) => row.bytes, cell: (row) => bytes(row.bytes), numeric: true },
    { key: "wire_bytes", label: "sent", value: (row) => row.wire_bytes, numeric: true,
      cell: (row) => [bytes(row.wire_bytes), el("span", { class: "share", "width%": (100 * row.wire_bytes) / most })] },
    { key: "overlaps", label: "overlaps", value: (row) => overlap[row.overlaps] },
    { key: "leaf", label: "leaf or dims", value: (row) => row.leaf, mono: true },
    { key: "source", label: "source", value: (row) => row.source, mono: true },
    { key: "dtype", label: "type", value: (row) => row.dtype },
    { key: "participants", label: "over", value: (row) => row.participants, numeric: true },
    { key: "emitted", label: "emitted as", value: (row) => row.emitted, cell: (row) => el("span", { title: row.operation }, row.emitted) },
  ];
  const table = sortable(columns, rows, "Collectives", "wire_bytes");
  const said = el("p", { class: "count", role: "status", id: "collectives-count" });
  const text = el("input", { type: "search", id: "filter-text", placeholder: "leaf, source, type \u2026", autocomplete: "off" });
  const select = (id, values) => el("select", { id }, el("option", { value: "" }, "all"), [...new Set(values)].sort().map((value) => el("option", { value }, value)));
  const axis = select("filter-axis", rows.flatMap((row) => row.axes));
  const kind = select("filter-kind", rows.map((row) => row.kind));
  const phase = select("filter-phase", rows.map((row) => row.phase));
  const haystack = new Map(rows.map((row) => [row, columns.map((column) => column.value(row)).concat(row.operation).join("\n").toLowerCase()]));
  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = rows.filter((row) => (!axis.value || row.axes.includes(axis.value)) && (!kind.value || row.kind === kind.value) &&
      (!phase.value || row.phase === phase.value) && words.every((word) => haystack.get(row).includes(word)));
    table.show(chosen);
    const sent = chosen.reduce((sum, row) => sum + row.wire_bytes, 0);
    const times = chosen.reduce((sum, row) => sum + row.count, 0);
    said.textContent = `${whole(chosen.length)} of ${whole(rows.length)} collectives, run ${whole(times)} times, ${bytes(sent)} sent`;
    said.dataset.rows = chosen.length;
    said.dataset.sent = sent;
  }
  const label = (name, control, grow) => el("label", { class: grow && "grow" }, name, control);
  const bar = el("div", { class: "filters", role: "search", "aria-label": "Filter the collectives" },
    label("search", text, true), label("axis", axis), label("kind", kind), label("phase", phase));
  bar.addEventListener("input", filter);
  into("collectives", bar, said, table.nodes);
  filter();
}

// ---- the mesh on the hardware ---------------------------------------------------------------

const FEW = ["#3b6fd4", "#e0872f", "#16907e", "#c43f7b", "#7b51cf", "#9a8a1c", "#4fa8d8", "#8a5a44"];
function colour(index, size) {
  if (size <= FEW.length) return FEW[index];
  const part = index / (size - 1); // from deep violet over blue and green to yellow
  return `oklch(${(0.36 + 0.5 * part).toFixed(3)} 0.15 ${(300 - 200 * part).toFixed(1)})`;
}
const inkOn = (index, size) => (size > FEW.length && index / (size - 1) > 0.5 ? "#111" : "#fff");

// One drawing for each plane of a torus, or each host: {caption, columns, rows, cells}.
function planes(devices) {
  const found = new Map();
  devices.forEach((device, index) => {
    if (!found.has(device.plane)) found.set(device.plane, { caption: device.plane, cells: [] });
    found.get(device.plane).cells.push({ index, x: device.x, y: device.y });
  });
  for (const plane of found.values()) {
    plane.columns = Math.max(...plane.cells.map((cell) => cell.x)) + 1;
    plane.rows = Math.max(...plane.cells.map((cell) => cell.y)) + 1;
    const seen = new Map(); // several devices of one chip share its coordinates
    for (const cell of plane.cells) {
      const key = `${cell.x},${cell.y}`;
      seen.set(key, [...(seen.get(key) || []), cell]);
    }
    for (const sharing of seen.values()) sharing.forEach((cell, i) => { cell.nth = i; cell.of = sharing.length; });
  }
  return [...found.values()].sort((a, b) => inOrder(a.caption, b.caption));
}
function mesh() {
  if (!layout) return into("mesh", el("p", { class: "note" }, `Nothing to draw: where the devices of ${plan.topology} sit is not known.`));
  if (!Array.isArray(layout))
    return into("mesh", el("p", { class: "note" }, `${whole(layout.count)} devices: more than the ${whole(layout.most)} that can be told apart in a drawing.`));
  const sizes = plan.mesh;
  const axes = Object.keys(sizes);
  const select = el("select", { id: "mesh-axis" }, axes.map((axis) => el("option", { value: axis }, `${axis} (${sizes[axis]})`)));
  select.value = axes.find((axis) => sizes[axis] > 1) || axes[0];
  const legend = el("div", { class: "legend" });
  const readout = el("p", { class: "readout", role: "status", id: "mesh-readout" });
  const drawn = planes(layout);
  const widest = Math.max(...drawn.map((plane) => plane.columns));
  const side = layout.length > 1024 ? (widest > 16 ? 12 : 16) : widest > 32 ? 13 : widest > 16 ? 20 : widest > 8 ? 26 : layout.length > 256 || widest > 4 ? 34 : 44;
  const rects = [];
  const labels = [];
  const box = el("div", { class: "planes", id: "mesh-planes", tabindex: "0", role: "img",
    "aria-label": `${layout.length} devices of ${plan.topology} coloured by mesh axis; arrow keys go from device to device` },
    drawn.map((plane) => el("figure", {}, el("figcaption", {}, plane.caption), shape("svg", { width: plane.columns * side, height: plane.rows * side, "aria-hidden": "true" },
      plane.cells.map((cell) => {
        const width = side / cell.of;
        const [x, y] = [cell.x * side + cell.nth * width, cell.y * side];
        rects[cell.index] = shape("rect", { x, y, width, height: side, rx: side > 18 ? 5 : 2, "data-device": cell.index });
        labels[cell.index] = width >= 24 ? shape("text", { x: x + width / 2, y: y + side / 2 }) : null;
        return [rects[cell.index], labels[cell.index]];
      })))));
  const hint = "Point at a device, or use the arrow keys, to see where it is and with whom it communicates.";
  let here = -1;
  function paint() {
    const [axis, size] = [select.value, sizes[select.value]];
    layout.forEach((device, index) => {
      const at = device.mesh[axis] || 0;
      rects[index].setAttribute("fill", colour(at, size));
      if (labels[index]) { labels[index].textContent = at; labels[index].setAttribute("fill", inkOn(at, size)); }
    });
    const swatch = (at) => el("span", {}, shape("svg", { width: 12, height: 12, "aria-hidden": "true" }, shape("rect", { width: 12, height: 12, rx: 3, fill: colour(at, size) })), String(at));
    const steps = size <= 16 ? [...Array(size).keys()] : [0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * (size - 1)));
    legend.replaceChildren(el("span", {}, `index along ${axis}:`), ...steps.map(swatch));
    pick(here);
  }
  function pick(index) {
    if (here >= 0) rects[here].classList.remove("here");
    here = index;
    box.classList.toggle("picked", here >= 0);
    if (here < 0) { readout.textContent = hint; return; }
    const axis = select.value;
    const others = axes.filter((name) => name !== axis);
    const device = layout[here];
    let group = 0;
    layout.forEach((other, i) => {
      const same = others.every((name) => other.mesh[name] === device.mesh[name]);
      rects[i].classList.toggle("group", same);
      group += same;
    });
    rects[here].classList.add("here");
    const at = axes.map((name) => `${name} ${device.mesh[name]} of ${sizes[name]}`).join(", ");
    readout.textContent = `Device ${here}: ${device.where}; ${at}. Its group along ${axis}: ${group} device${group === 1 ? "" : "s"}.`;
  }
  box.addEventListener("pointerover", (event) => pick(event.target.dataset.device === undefined ? -1 : Number(event.target.dataset.device)));
  box.addEventListener("pointerleave", () => pick(-1));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") pick(-1);
    if (!step) return;
    event.preventDefault();
    pick((here + step + layout.length) % layout.length);
  });
  select.addEventListener("input", paint);
  into("mesh", el("div", { class: "filters" }, el("label", {}, "colour by axis", select), legend), box, readout);
  paint();
}

for (const draw of [head, tiles, memory, traffic, time, warnings, mesh, collectives, decisions, provenance]) draw();
document.documentElement.dataset.ready = "yes";
