"use strict";
const SVG = "http://www.w3.org/2000/svg";
const curves = JSON.parse(document.getElementById("data").textContent);
const runs = Object.keys(curves);
const dashes = ["", "6 3", "2 3", "9 3 2 3"];

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function show(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-3 ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(4)));
}

/* Tables: a heading's button sorts; empty cells stay last either way. */
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
    const numeric = head.classList.contains("n");
    const key = (row) => row.cells[column].dataset.v;
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const a = key(one), b = key(other);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return up * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    table.tBodies[0].append(...rows);
  }));
}

/* The graph: a stage under the pointer or the focus shows its own edges. */
for (const graph of document.querySelectorAll("svg.graph")) {
  const edges = [...graph.querySelectorAll(".edge")];
  for (const node of graph.querySelectorAll(".node")) {
    const name = node.dataset.node;
    const on = () => {
      graph.classList.add("focus");
      edges.forEach((e) => e.classList.toggle("on", e.dataset.from === name || e.dataset.to === name));
    };
    const off = () => graph.classList.remove("focus");
    const target = node.closest("a") || node;
    target.addEventListener("pointerenter", on);
    target.addEventListener("pointerleave", off);
    target.addEventListener("focus", on);
    target.addEventListener("blur", off);
  }
}

/* Curves. A series is {run, color, dash, x: [], y: []}. */
function series(run, column) {
  const [x, y] = curves[run][column];
  const i = runs.indexOf(run);
  return { run, x, y, color: `var(--c${i % 8})`, dash: dashes[Math.floor(i / 8) % dashes.length] };
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function decades(low, high) {
  const first = Math.ceil(low - 1e-9), last = Math.floor(high + 1e-9);
  if (last - first < 1) return ticks(10 ** low, 10 ** high, 4).filter((v) => v > 0);
  const every = Math.ceil((last - first + 1) / 6);
  return Array.from({ length: last - first + 1 }, (_, i) => first + i).filter((_, i) => i % every === 0).map((p) => 10 ** p);
}

function draw(box, given, { log = false, height = 300, label, wanted = 5 }) {
  box.replaceChildren();
  const width = Math.max(box.clientWidth, 160), left = 52, right = 12, top = 10, bottom = 26;
  const drawn = given.map((s) => ({ ...s, points: s.x.map((x, i) => [x, s.y[i]]).filter(([, y]) => !log || y > 0) }));
  const points = drawn.flatMap((s) => s.points);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label }, box);
  if (!points.length) {
    make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, svg, log ? "nothing above zero to show" : "nothing to show");
    return null;
  }
  const scale = (v) => (log ? Math.log10(v) : v);
  const least = (axis, f) => points.reduce((m, p) => Math.min(m, f(p[axis])), Infinity);
  const most = (axis, f) => points.reduce((m, p) => Math.max(m, f(p[axis])), -Infinity);
  const same = (v) => v;
  let [x0, x1, y0, y1] = [least(0, same), most(0, same), least(1, scale), most(1, scale)];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  const air = y0 === y1 ? Math.abs(y0) / 10 || 1 : (y1 - y0) / 25;
  [y0, y1] = [y0 - air, y1 + air];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((scale(y) - y0) / (y1 - y0)) * (height - top - bottom);
  for (const y of log ? decades(y0, y1) : ticks(y0, y1, wanted)) {
    make("line", { class: "gridline", x1: left, x2: width - right, y1: py(y), y2: py(y) }, svg);
    make("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, svg, show(Number(y.toPrecision(6))));
  }
  for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 130)))) {
    make("text", { x: px(x), y: height - 8, "text-anchor": px(x) > width - 30 ? "end" : "middle" }, svg, show(x));
  }
  for (const s of drawn) {
    if (s.points.length === 1) {
      make("circle", { cx: px(s.points[0][0]), cy: py(s.points[0][1]), r: 3.5, style: `fill:${s.color}` }, svg);
      continue;
    }
    const d = s.points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    make("path", { class: "line", d, style: `stroke:${s.color}`, "stroke-dasharray": s.dash }, svg);
  }
  return { svg, drawn, px, x0, x1, width, left, right, top, floor: height - bottom };
}

const chart = document.getElementById("chart");
if (chart) {
  const select = document.getElementById("column"), log = document.getElementById("log");
  const legend = document.getElementById("legend"), readout = document.getElementById("readout");
  const count = {};
  for (const run of runs) for (const column of Object.keys(curves[run])) count[column] = (count[column] || 0) + 1;
  const rank = (c) => (c.startsWith("val/") ? 0 : c.endsWith("/loss") ? 1 : 2);
  const columns = Object.keys(count).sort((a, b) => rank(a) - rank(b) || count[b] - count[a] || a.localeCompare(b));
  for (const column of columns) select.append(new Option(`${column} (${count[column]} ${count[column] === 1 ? "run" : "runs"})`, column));
  const hidden = new Set();
  let plot = null, cursor = null, at = null;

  const point = (x) => {
    if (!plot) return;
    at = Math.min(Math.max(x, plot.x0), plot.x1);
    if (cursor) cursor.remove();
    cursor = make("line", { class: "cursor", x1: plot.px(at), x2: plot.px(at), y1: plot.top, y2: plot.floor }, plot.svg);
    readout.textContent = `round ${show(Math.round(at))}: ` + plot.drawn.filter((s) => s.points.length).map((s) => {
      const near = s.points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
      return `${s.run} ${show(near[1])}`;
    }).join(" · ");
  };
  const redraw = () => {
    const column = select.value, having = runs.filter((run) => column in curves[run]);
    const shown = having.filter((run) => !hidden.has(run)).map((run) => series(run, column));
    const ends = shown.map((s) => `${s.run} ends at ${show(s.y[s.y.length - 1])}`).join(", ");
    plot = draw(chart, shown, { log: log.checked, label: `${column} over rounds. ${ends}` });
    cursor = null;
    const below = log.checked ? shown.reduce((n, s) => n + s.y.filter((y) => y <= 0).length, 0) : 0;
    readout.textContent = below ? `${below} points at or below zero are not shown` : ends;
    legend.replaceChildren(...having.map((run) => {
      const button = document.createElement("button"), s = series(run, column);
      button.type = "button";
      button.setAttribute("aria-pressed", String(!hidden.has(run)));
      const sample = make("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" }, button);
      make("path", { d: "M0 4H24", style: `stroke:${s.color}`, "stroke-dasharray": s.dash }, sample);
      button.append(run);
      button.addEventListener("click", () => {
        if (!hidden.delete(run)) hidden.add(run);
        redraw();
        [...legend.children].find((b) => b.textContent === run).focus();
      });
      return button;
    }));
  };
  chart.tabIndex = 0;
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", "Chart; left and right move along the rounds");
  chart.addEventListener("pointermove", (event) => {
    if (!plot) return;
    const share = (event.clientX - chart.getBoundingClientRect().left - plot.left) / (plot.width - plot.left - plot.right);
    point(plot.x0 + share * (plot.x1 - plot.x0));
  });
  chart.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !plot) return;
    event.preventDefault();
    point((at === null ? plot.x0 : at) + (way * (plot.x1 - plot.x0)) / 40);
  });
  select.addEventListener("change", redraw);
  log.addEventListener("change", redraw);
  new ResizeObserver(redraw).observe(chart);
}

/* A run's own curves are drawn when they are opened. */
for (const details of document.querySelectorAll(".small-charts")) {
  const run = details.dataset.run, box = details.querySelector(".small");
  details.addEventListener("toggle", () => {
    if (!details.open || box.children.length) return;
    for (const column of Object.keys(curves[run])) {
      const cell = document.createElement("div"), head = document.createElement("p"), last = document.createElement("span");
      const s = series(run, column);
      last.textContent = show(s.y[s.y.length - 1]);
      head.append(last, column);
      cell.append(head, document.createElement("div"));
      box.append(cell);
      draw(cell.lastElementChild, [s], { height: 120, wanted: 3, label: `${column} of ${run}, ends at ${last.textContent}` });
    }
  });
}
