// What all pages share: elements, quantities, saving. Strings of a document become text nodes,
// never markup; every element is made by `el` or `shape`.
"use strict";

const held = (id) => JSON.parse(document.getElementById(id).textContent);
const { compare: inOrder } = new Intl.Collator("en", { numeric: true });

// ---- making elements ------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "width%") node.style.width = `${value}%`;
    else if (key === "left%") node.style.left = `${value}%`;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const shape = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const into = (id, ...children) => fill(document.getElementById(id), {}, children);

// ---- quantities -----------------------------------------------------------------------------

const known = (value) => value !== null && value !== undefined;
function bytes(value) {
  if (!known(value)) return "unknown";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (; Math.round(value * 10) / 10 >= 1024 && unit < 5; unit++) value /= 1024;
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}
const whole = (value) => Math.round(value).toLocaleString("en-US");

// ---- the document as a file -----------------------------------------------------------------

// The button `download` saves a document under a name.
function offer(document_, name) {
  document.getElementById("download").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(document_, null, 1)], { type: "application/json" }));
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
}
