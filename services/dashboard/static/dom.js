// Small helpers: elements, numbers for people, colours that mean the same everywhere on the page.

import { nowS } from "./live.js";

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "mark") element.style.setProperty("--mark", value);
    else if (name === "ratio") element.style.setProperty("--ratio", value);
    else if (name === "width%") element.style.width = `${value}%`;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Writes text only where it differs: screen readers and selections stay where they are.
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const empty = (...children) => h("p", { class: "empty" }, ...children);
export const code = (text) => h("code", {}, text);

export function num(value, digits = 4) {
  if (value === null || value === undefined) return "not a number";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 0.05) return "<0.1 ms";
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

export function ago(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1) return "now";
  if (s < 90) return `${Math.floor(s)} s`;
  if (s < 5400) return `${Math.floor(s / 60)} min`;
  if (s < 129600) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} days`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = Number(count);
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

// Okabe and Ito's palette, without black and yellow: told apart by colour-blind people, on light and on dark.
export const palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6fd1", "#7a7a7a"];
export const seriesColour = (index) => palette[index % palette.length];
export const versionColour = (version) => (version ? palette[version.number % palette.length] : "#7a7a7a");
export const versionText = (version) => (version ? `${version.model} v${version.number}` : "no version");

export function versionMark(version) {
  return h("span", { class: "version", mark: versionColour(version), title: version ? `digest ${version.digest}…` : "" }, versionText(version));
}

export function table(caption, heads, rows, { numeric = [] } = {}) {
  const align = (index) => (numeric.includes(index) ? "num" : null);
  return h("div", { class: "scroll" }, h("table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: align(i) }, head)))),
    h("tbody", {}, rows.map((row) => {
      const { cells, ...attributes } = Array.isArray(row) ? { cells: row } : row;
      return h("tr", attributes, cells.map((cell, i) => h("td", { class: align(i) }, cell ?? "–")));
    }))));
}

// An age that goes on growing without its surroundings being drawn again.
const since = (t) => (nowS() - t < 1 ? "just now" : `${ago(nowS() - t)} ago`);
export const age = (t) => h("time", { "data-t": t }, since(t));

export function tellAges() {
  document.querySelectorAll("time[data-t]").forEach((element) => write(element, since(Number(element.dataset.t))));
}

// Draws parts() into body only when key (anything that JSON holds) differs from the last time: what a person is about to
// press, has selected or listens to stays where it is.
export function drawIfChanged(body, key, parts) {
  const text = JSON.stringify(key);
  if (body.dataset.drawn === text) return;
  body.replaceChildren(...parts());
  body.dataset.drawn = text;
}
