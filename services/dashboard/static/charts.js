// Hand-drawn charts. Each also says in words, in its aria-label, what it shows.

import { num, svg, versionColour, versionText } from "./dom.js";

function prepare(canvas) {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  context.font = "11px system-ui, sans-serif";
  // light-dark() is resolved by the browser only in real properties.
  return { context, width, height, ink: style.color, colour };
}

// A few round numbers that cover [low, high].
export function ticks(low, high, count = 4) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / count;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * magnitude).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

// The same on a logarithmic axis, as exponents: 1, 2 and 5 of each decade, or decades alone where those are too many.
export function logTicks(low, high) {
  const exponents = [];
  for (let decade = Math.floor(low); decade <= high; decade += 1) {
    for (const factor of high - low < 2 ? [1, 2, 5] : [1]) exponents.push(decade + Math.log10(factor));
  }
  return exponents.filter((at) => at >= low && at <= high);
}

function range(points) {
  let low = Infinity;
  let high = -Infinity;
  for (const { y } of points) {
    if (y === null || y === undefined) continue;
    low = Math.min(low, y);
    high = Math.max(high, y);
  }
  if (low > high) return [0, 1];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.05 || 0.5;
  return [low - margin, high + margin];
}

// series: [{colour, points: [{x, y}]}]; marks: [{x, colour, text}]. A null y is a gap.
export function lineChart(canvas, { series, x, xTicks, xLabel, yLabel, marks = [], logarithmic = false }) {
  const { context, width, height, ink } = prepare(canvas);
  if (!width) return;
  const edge = { left: 52, right: 8, top: 16, bottom: 22 };
  const value = (y) => (y === null || y === undefined || (logarithmic && y <= 0) ? null : logarithmic ? Math.log10(y) : y);
  const [low, high] = range(series.flatMap((one) => one.points.map((point) => ({ y: value(point.y) }))));
  const px = (at) => edge.left + ((at - x[0]) / (x[1] - x[0] || 1)) * (width - edge.left - edge.right);
  const py = (at) => height - edge.bottom - ((at - low) / (high - low)) * (height - edge.top - edge.bottom);
  context.strokeStyle = context.fillStyle = ink;
  context.lineWidth = 1;
  for (const at of logarithmic ? logTicks(low, high) : ticks(low, high)) {
    context.globalAlpha = 0.14;
    context.beginPath();
    context.moveTo(edge.left, Math.round(py(at)) + 0.5);
    context.lineTo(width - edge.right, Math.round(py(at)) + 0.5);
    context.stroke();
    context.globalAlpha = 0.7;
    context.textAlign = "right";
    context.fillText(num(logarithmic ? 10 ** at : at, 3), edge.left - 6, py(at) + 4);
  }
  context.globalAlpha = 0.7;
  context.textAlign = "center";
  for (const at of xTicks) context.fillText(at.text, Math.min(Math.max(px(at.x), edge.left + 8), width - 22), height - 7);
  context.textAlign = "left";
  context.fillText(yLabel, 4, 11);
  context.textAlign = "right";
  context.fillText(xLabel, width - edge.right, 11);
  for (const mark of marks) {
    context.globalAlpha = 0.9;
    context.strokeStyle = context.fillStyle = mark.colour;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(px(mark.x), edge.top);
    context.lineTo(px(mark.x), height - edge.bottom);
    context.stroke();
    context.setLineDash([]);
    context.textAlign = "center";
    context.fillText(mark.text, px(mark.x), edge.top + 9);
  }
  context.globalAlpha = 1;
  context.lineWidth = 1.6;
  for (const one of series) {
    context.strokeStyle = context.fillStyle = one.colour;
    context.beginPath();
    let drawing = false;
    for (const point of one.points) {
      const y = value(point.y);
      if (y === null) {
        drawing = false;
      } else if (drawing) {
        context.lineTo(px(point.x), py(y));
      } else {
        context.moveTo(px(point.x), py(y));
        drawing = true;
      }
    }
    context.stroke();
    if (one.points.length === 1 && value(one.points[0].y) !== null) {
      context.beginPath();
      context.arc(px(one.points[0].x), py(value(one.points[0].y)), 2.5, 0, 7);
      context.fill();
    }
  }
}

// Which ticks a chunk is for: from the observation it answers, as many as the model's horizon.
export function covers(chunk, horizon) {
  return horizon ? [chunk.requested_tick, chunk.requested_tick + horizon - 1] : null;
}

export function chunkTitle(chunk, horizon) {
  if (chunk.refusal) return `Asked at tick ${chunk.requested_tick}: refused, ${chunk.refusal}`;
  const span = covers(chunk, horizon);
  const ticksText = span ? `, for ticks ${span[0]} to ${span[1]}` : "";
  return `${versionText(chunk.version)}: asked at tick ${chunk.requested_tick}, came at tick ${chunk.arrived_tick} after ${Math.round(chunk.latency_ms)} ms${ticksText}`;
}

// Upper row: each request from asking to arriving. Lower row: which chunk the robot acts on. Crosses: refusals.
export function chunkTimeline(element, chunks, { now, windowS, horizon, rateHz }) {
  const width = element.clientWidth || 600;
  const left = 52;
  const px = (t) => left + ((t - (now - windowS)) / windowS) * (width - left - 6);
  const rows = [
    svg("text", { x: 0, y: 24 }, "asked"),
    svg("text", { x: 0, y: 49 }, "acting"),
  ];
  for (let s = windowS; s >= 0; s -= 5) {
    rows.push(svg("line", { x1: px(now - s), x2: px(now - s), y1: 8, y2: 58, stroke: "currentColor", "stroke-opacity": 0.12 }));
    rows.push(svg("text", { x: px(now - s), y: 73, "text-anchor": s === windowS ? "start" : s ? "middle" : "end" }, s ? `−${s} s` : "now"));
  }
  const shown = chunks.filter((chunk) => chunk.t > now - windowS - 5);
  const arrived = shown.filter((chunk) => !chunk.refusal);
  const title = (chunk) => svg("title", {}, chunkTitle(chunk, horizon(chunk)));
  const box = (from, to, y, height, chunk, kind) => {
    const begin = Math.max(from, left);
    return svg("rect", {
      x: begin, y, width: Math.max(2, to - begin), height, rx: 2, fill: versionColour(chunk.version), class: kind,
      "data-request": chunk.request_id, "data-version": chunk.version?.number ?? "",
    }, title(chunk));
  };
  arrived.forEach((chunk, index) => {
    if (px(chunk.t) >= left) rows.push(box(px(chunk.t - chunk.latency_ms / 1000), px(chunk.t), 14, 12, chunk, "asked"));
    // A chunk acts until the next one comes, or until it has no more actions.
    const length = (horizon(chunk) ?? Infinity) - (chunk.arrived_tick - chunk.requested_tick);
    const end = Math.min(arrived[index + 1]?.t ?? now, chunk.t + length / (rateHz || 1));
    if (px(end) >= left) rows.push(box(px(chunk.t), px(end) - 1, 36, 18, chunk, "acting"));
  });
  for (const chunk of shown.filter((one) => one.refusal && px(one.t) >= left)) {
    const at = px(chunk.t);
    rows.push(svg("path", {
      d: `M${at - 5} 15l10 10m0-10l-10 10`, stroke: "var(--bad)", "stroke-width": 2.5, class: "refused", "data-request": chunk.request_id,
    }, title(chunk)));
  }
  element.setAttribute("viewBox", `0 0 ${width} 78`);
  element.replaceChildren(...rows);
  const refused = shown.filter((chunk) => chunk.refusal).length;
  const newest = arrived.at(-1);
  element.setAttribute("aria-label", newest
    ? `${arrived.length} chunks in the last ${windowS} seconds, newest from ${versionText(newest.version)}; ${refused} refused`
    : `No chunk in the last ${windowS} seconds; ${refused} refused`);
}
