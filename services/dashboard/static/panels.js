// Services, latency and learning: what the whole fleet shares.

import { lineChart, ticks } from "./charts.js";
import { ago, code, empty, h, ms, num, table, versionColour, versionText, write } from "./dom.js";
import { latest, nowS, values } from "./live.js";

const STAGES = [["capture", "capture"], ["network", "network"], ["queue", "server queue"], ["compute", "server compute"]];
const kinds = { robot: "robot", actor: "actor", inference: "inference", weights: "weights", learner: "learner", store: "dataset store" };

export function renderServices() {
  const list = document.getElementById("service-list");
  const services = latest("services") ?? [];
  if (!services.length) {
    if (!list.querySelector(".empty")) list.replaceChildren(h("li", { class: "empty" }, "No service is named. ", code("manyhands dashboard --help"), " lists the flags."));
    return;
  }
  list.querySelector(".empty")?.remove();
  services.forEach((service, index) => {
    let item = list.querySelector(`[data-service="${CSS.escape(service.id)}"]`);
    if (!item) {
      item = h("li", { class: "service", "data-service": service.id }, h("div", {}, h("strong")),
        h("div", {}, h("span", { class: "state" }), " ", h("span", { class: "for soft" })), h("div", { class: "where soft" }));
      list.insertBefore(item, list.children[index] ?? null);
    }
    item.dataset.state = service.state;
    write(item.querySelector("strong"), service.name ? `${kinds[service.kind]} ${service.name}` : kinds[service.kind]);
    write(item.querySelector(".state"), service.state);
    write(item.querySelector(".for"), service.since_t === undefined ? "" : `for ${ago(nowS() - service.since_t)}`);
    write(item.querySelector(".where"), `${service.address}${service.latency_ms === null || service.latency_ms === undefined ? "" : `, answers in ${ms(service.latency_ms)}`}`);
    item.title = service.detail ?? "";
  });
}

export function renderLatency() {
  const body = document.getElementById("latency-body");
  const robots = (latest("robots") ?? []).map((name) => [name, latest(`robot:${name}:latency`)]).filter(([, one]) => one?.count);
  if (!robots.length) {
    body.replaceChildren(empty("No chunk was asked for yet. Run a served policy on an actor that is named here (", code("--actor HOST:PORT"), ")."));
    return;
  }
  const longest = Math.max(...robots.map(([, one]) => STAGES.reduce((sum, [stage]) => sum + one.stages[stage].p50_ms, 0)), 1e-6);
  body.replaceChildren(
    h("ul", { class: "keys" }, STAGES.map(([stage, name]) => h("li", {}, h("i", { class: stage, "aria-hidden": "true" }), name))),
    table("Last 512 chunks of each robot: median / 99th percentile", ["Robot", "Median by stage", "All", ...STAGES.map(([, name]) => name), "Chunks"],
      robots.map(([name, one]) => ({
        "data-latency": name,
        cells: [name,
          h("div", { class: "bar", role: "img", "aria-label": STAGES.map(([stage, text]) => `${text} ${ms(one.stages[stage].p50_ms)}`).join(", ") },
            STAGES.map(([stage]) => h("span", { class: stage, "width%": (100 * one.stages[stage].p50_ms) / longest }))),
          pair(one.total), ...STAGES.map(([stage]) => pair(one.stages[stage])), String(one.count)],
      })), { numeric: [2, 3, 4, 5, 6, 7] }));
}

const pair = (one) => `${ms(one.p50_ms).replace(" ms", "")} / ${ms(one.p99_ms)}`;

const CURVES = [["train/loss", "Loss", true], ["train/lr", "Learning rate", false]];
const charts = new Map();

export function renderLearning() {
  const body = document.getElementById("learning-body");
  const learner = latest("learner");
  const points = mergedPoints();
  if (!learner) {
    body.replaceChildren(latest("configured")?.learner ? empty("The learner has not answered yet.") : empty("No learner is named: ", code("--learner HOST:PORT"), "."));
    charts.clear();
    return;
  }
  if (!charts.size) {
    const status = h("dl", { class: "facts" });
    const note = h("p", { class: "refusal", role: "status" });
    const parts = CURVES.map(([name, title]) => {
      const canvas = h("canvas", { class: "chart", role: "img", "data-curve": name });
      const last = h("output", { "data-last": name });
      charts.set(name, { canvas, last });
      return h("div", {}, h("div", { class: "row spread" }, h("h4", {}, title), last), canvas);
    });
    const others = h("div");
    charts.set("status", { status, note, others, parts });
    body.replaceChildren(status, note, ...parts, others);
  }
  const { status, note, others, parts } = charts.get("status");
  const newest = points.findLast((point) => Object.keys(point.metrics).length) ?? points.at(-1);
  status.replaceChildren(...[
    ["State", learner.state || "unknown", "state"], ["Run", learner.run_id || "none yet"], learner.recipe && ["Recipe", learner.recipe],
    ["Step", learner.max_steps ? `${learner.step} of ${learner.max_steps}` : String(learner.step), "step"],
    ["Workers", String(learner.worker_count)], ["Restarts", String(learner.restart_count)],
    newest && newest.metrics["train/samples_per_s"] !== undefined && ["Speed", `${num(newest.metrics["train/samples_per_s"], 3)} samples/s`],
  ].filter(Boolean).map(([name, value, field]) => h("div", {}, h("dt", {}, name), h("dd", { "data-field": field }, value))));
  write(note, learner.state === "failed" ? learner.detail : "");
  const marks = points.filter((point) => point.published).map((point) => ({ x: point.step, colour: versionColour(point.published), text: `v${point.published.number}` }));
  parts.forEach((part) => { part.hidden = !points.length; });
  const first = points[0]?.step ?? 0;
  const end = Math.max(newest?.step ?? 1, first + 1);
  for (const [name, title, logarithmic] of CURVES) {
    const { canvas, last } = charts.get(name);
    const curve = points.filter((point) => point.metrics[name] !== undefined).map((point) => ({ x: point.step, y: point.metrics[name] }));
    lineChart(canvas, { series: [{ colour: versionColour({ number: 0 }), points: curve }], x: [first, end], marks, logarithmic,
      xTicks: ticks(first, end, 5).map((x) => ({ x, text: num(x) })), xLabel: "step", yLabel: logarithmic ? `${title}, log scale` : title });
    const value = curve.at(-1);
    write(last, value ? `${num(value.y)} at step ${value.x}` : "");
    canvas.setAttribute("aria-label", value ? `${title} over ${curve.length} points, last ${num(value.y)} at step ${value.x}; ${marks.length} versions published` : `${title}: no points yet`);
  }
  if (!points.length) {
    others.replaceChildren(empty(learner.state === "idle" ? "The learner is idle: start a run with the demo, or through LearnerService.StartRun." : "No point of the curve yet: starting takes a minute."));
    return;
  }
  const rest = Object.entries(newest.metrics).filter(([name]) => !charts.has(name));
  others.replaceChildren(...(rest.length ? [h("h4", {}, "Other metrics"), table(`At step ${newest.step}`, ["Metric", "Value"], rest.map(([name, value]) => [name, num(value)]), { numeric: [1] })] : []),
    ...(marks.length ? [h("p", { class: "soft", "data-field": "published" }, `Published: ${points.filter((point) => point.published).map((point) => `${versionText(point.published)} at step ${point.step}`).join(", ")}`)] : []));
}

// A step's metrics and its publishing come as two points, and the second may come late.
function mergedPoints() {
  const merged = new Map();
  for (const point of values("learner:points")) {
    const before = merged.get(point.step);
    merged.set(point.step, { step: point.step, metrics: { ...before?.metrics, ...point.metrics }, published: point.published ?? before?.published });
  }
  return [...merged.values()].sort((a, b) => a.step - b.step);
}
