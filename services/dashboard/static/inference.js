// The inference service: who is served, what is left of its capacity, how long stages take, what was refused.

import { age, bytes, code, drawIfChanged, empty, h, ms, num, table } from "./dom.js";
import { latest } from "./live.js";

const REFUSALS_SHOWN = 12;
const reasons = { invalid: "invalid", deadline: "too late", overloaded: "overloaded", internal: "the server's fault", unavailable: "model away", replayed: "replayed", "unknown session": "unknown session" };

export function renderInference() {
  const body = document.getElementById("inference-body");
  const server = latest("inference");
  if (!server) {
    drawIfChanged(body, [latest("configured")?.inference], () => [latest("configured")?.inference
      ? empty("The inference service has not answered yet.") : empty("No inference service is named: ", code("--inference HOST:PORT"), ".")]);
    return;
  }
  if (!document.getElementById("inference-facts")) {
    delete body.dataset.drawn;
    body.replaceChildren(h("dl", { class: "facts", id: "inference-facts" }), ...["room", "robots", "stages", "refusals"].map((name) => h("div", { id: `inference-${name}` })));
  }
  const part = (name) => document.getElementById(`inference-${name}`);
  const facts = [
    ["Robots", String(server.sessions.filter((one) => one.connected).length), "robots"],
    ["Chunks", String(server.chunk_count), "chunks"],
    ["Refused", String(server.refused_count), "refused"],
    ["Too late", String(server.missed_deadline_count), "missed"],
    ["In line", String(server.waiting_count), "waiting"],
    ["Engine restarts", String(server.engine_restart_count), "restarts"],
    server.memory_total_bytes && ["GPU memory", `${bytes(server.memory_used_bytes)} of ${bytes(server.memory_total_bytes)}`, "memory"],
  ].filter(Boolean);
  drawIfChanged(part("facts"), facts, () => facts.map(([name, value, field]) => h("div", {}, h("dt", {}, name), h("dd", { "data-field": field }, value))));
  drawIfChanged(part("room"), server.loads, () => [h("h4", {}, "Capacity"), ...Object.entries(server.loads).map(([model, load]) => room(model, load))]);
  drawIfChanged(part("robots"), server.sessions, () => [h("h4", {}, "Robots"), server.sessions.length
    ? table("One session a robot; times from received to answered, last 512 chunks", ["Robot", "Model", "Stream", "Chunks", "Refused", "Too late", "Median", "99th", "Subtasks"],
      server.sessions.map((one) => ({
        "data-session": one.robot_id,
        cells: [one.robot_id, one.model, one.connected ? "open" : "closed", String(one.chunk_count), String(one.refused_count),
          String(one.missed_deadline_count), ms(one.p50_ms), ms(one.p99_ms), subtasks(one)],
      })), { numeric: [3, 4, 5, 6, 7, 8] })
    : empty("No robot has a session.")]);
  drawIfChanged(part("stages"), server.stages, () => [h("h4", {}, "Stages"), server.stages.length
    ? table("All robots, last 4096 chunks", ["Stage", "Median", "99th percentile"],
      server.stages.map((stage) => ({ "data-stage": stage.stage, cells: [stage.stage, ms(stage.p50_ms), ms(stage.p99_ms)] })), { numeric: [1, 2] })
    : empty("No chunk was made yet.")]);
  const refusals = server.sessions.flatMap((one) => one.refusals.map((refusal) => ({ ...refusal, robot: one.robot_id })))
    .sort((a, b) => b.t - a.t).slice(0, REFUSALS_SHOWN);
  drawIfChanged(part("refusals"), refusals.map(({ t, ...rest }) => rest), () => (refusals.length ? [h("h4", {}, "Refusals"),
    table("Newest first; what comes for one reason and close together is one line", ["Robot", "Reason", "Message", "Times", "Last"],
      refusals.map((one) => ({ "data-refusal": one.robot, cells: [one.robot, reasons[one.reason] ?? one.reason, one.message, String(one.count), age(one.t)] })), { numeric: [3] })] : []));
}

// Beside its chunks: those it was given, and answers that were none.
function subtasks(session) {
  if (!session.subtask_count && !session.refused_subtask_count) return "-";
  return session.refused_subtask_count ? `${session.subtask_count}, ${session.refused_subtask_count} refused` : String(session.subtask_count);
}

// What is asked of what may be promised, and how many more robots like these fit.
function room(model, load) {
  if (!load.possible_per_s) {
    return h("div", { class: "room", "data-room": model }, h("div", { class: "row spread" }, h("strong", {}, model),
      h("span", {}, `${num(load.asked_per_s, 3)} chunks/s asked for; what can be made is not known while nothing runs`)));
  }
  const share = load.asked_per_s / load.usable_per_s;
  const each = load.session_count ? load.asked_per_s / load.session_count : 0;
  const more = each ? Math.max(0, Math.floor((load.usable_per_s - load.asked_per_s) / each)) : null;
  const left = share > 1 ? "nothing left: robots are asked to replan less often"
    : more === null ? `${num(load.usable_per_s, 3)} chunks/s left` : `the model could serve ${more} more like these`;
  const questions = load.text_share ? `; questions take ${num(100 * load.text_share, 2)} % of the device` : "";
  const text = `${num(load.asked_per_s, 3)} of ${num(load.usable_per_s, 3)} chunks/s asked for, ${left}${questions}`;
  return h("div", { class: "room", "data-room": model, "data-state": share > 1 ? "full" : "free" },
    h("div", { class: "row spread" }, h("strong", {}, model), h("span", {}, text)),
    h("div", { class: "bar", role: "img", "aria-label": text }, h("span", { "width%": Math.min(100, 100 * share) })));
}
