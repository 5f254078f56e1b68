// A card per robot: cameras, mode, joints, chunks, and the two ways to stop it.

import { chunkTimeline, covers, lineChart } from "./charts.js";
import { ago, code, empty, h, ms, num, seriesColour, svg, table, versionMark, versionText, write } from "./dom.js";
import { confirmed } from "./dialog.js";
import { latest, nowS, values } from "./live.js";

const WINDOW_S = 20;
const FIRST_PLOTTED = 6;
const cards = new Map();

export function renderRobots(changed) {
  const list = document.getElementById("robot-list");
  const names = latest("robots") ?? [];
  if (changed.has("robots")) {
    for (const [name, card] of cards) {
      if (!names.includes(name)) {
        card.element.remove();
        cards.delete(name);
      }
    }
    for (const name of names) {
      if (!cards.has(name)) cards.set(name, new RobotCard(name));
      list.append(cards.get(name).element);
    }
    if (!names.length) {
      list.replaceChildren(empty("No robot is named. Start the dashboard with ", code("--robot NAME=HOST:PORT"), " or with ",
        code("--actor HOST:PORT"), ", which tells where its robot is."));
    } else {
      list.querySelector(":scope > .empty")?.remove();
    }
  }
  for (const [name, card] of cards) card.update((suffix) => changed.has(suffix ? `robot:${name}:${suffix}` : `robot:${name}`));
}

// Called a few times a second: time passes on the axes also when nothing comes.
export function animateRobots() {
  for (const card of cards.values()) card.animate();
}

class RobotCard {
  constructor(name) {
    this.name = name;
    this.topic = `robot:${name}`;
    this.cameras = new Map();
    this.plotted = new Map();
    this.feature = "";
    this.mode = h("span", { class: "badge", "data-field": "mode" }, "connecting");
    this.task = h("p", { class: "soft", "data-field": "task" });
    this.note = h("p", { class: "refusal", role: "status" });
    this.facts = h("dl", { class: "facts" });
    this.results = h("ol", { class: "results", "aria-label": "Episodes of this run" });
    this.cameraList = h("div", { class: "cameras" });
    this.select = h("select", { "aria-label": `What to plot of ${name}`, onchange: () => this.choose(this.select.value) });
    this.plot = h("canvas", { class: "plot", role: "img", "aria-label": "No values yet" });
    this.legend = h("ul", { class: "legend" });
    this.all = h("div", { class: "values" });
    this.allDetails = h("details", { ontoggle: () => this.updateAll() }, h("summary", {}, "All values, choose what is plotted"), this.all);
    this.joints = h("div", { hidden: true }, h("div", { class: "row spread" }, h("h4", {}, `Last ${WINDOW_S} s`), this.select), this.plot, this.legend, this.allDetails);
    this.timeline = svg("svg", { class: "timeline", role: "img", "aria-label": "No chunk yet", preserveAspectRatio: "none" });
    this.chunkNote = h("div");
    this.refusal = h("p", { class: "refusal", role: "status", "data-field": "refusal" });
    this.chunkTable = h("div");
    this.chunkDetails = h("details", { ontoggle: () => this.updateChunks() }, h("summary", {}, "Last chunks and requests"), this.chunkTable);
    this.holdButton = h("button", { type: "button", onclick: () => this.stop("hold") }, "Hold");
    this.stopButton = h("button", { type: "button", class: "danger", onclick: () => this.stop("emergency-stop") }, "Emergency stop");
    this.answer = h("p", { class: "soft", role: "status" });
    this.element = h("article", { class: "robot", "data-robot": name, "aria-label": `Robot ${name}` },
      h("div", { class: "row spread" }, h("div", { class: "row" }, h("h3", {}, name), this.mode),
        h("div", { class: "row" }, this.holdButton, this.stopButton)),
      this.task, this.note, this.answer, this.facts, this.results, this.cameraList, this.joints,
      h("h4", {}, "Action chunks"), this.timeline, this.chunkNote, this.refusal, this.chunkDetails);
  }

  update(changed) {
    const robot = latest(this.topic);
    if (!robot) return;
    if (changed("")) this.updateRobot(robot);
    if (changed("") || changed("run") || changed("tick")) this.updateFacts(robot);
    if (changed("results")) this.updateResults();
    if (changed("samples")) this.updateSamples(robot);
    if (changed("chunks") || changed("run") || !this.chunkNote.children.length) this.updateChunks();
  }

  animate() {
    const robot = latest(this.topic);
    if (!robot || document.hidden) return;
    this.drawPlot(robot);
    this.drawTimeline(robot);
  }

  updateRobot(robot) {
    const modes = { active: "good", idle: "", holding: "warn", "emergency stop": "bad", fault: "bad" };
    const mode = robot.connected ? robot.status?.mode || "unknown" : robot.address ? "away" : "no agent named";
    write(this.mode, mode);
    this.mode.className = `badge ${robot.connected ? modes[mode] ?? "" : "bad"}`;
    this.element.classList.toggle("away", !robot.connected);
    write(this.task, robot.task ? `Task: ${robot.task}` : "");
    write(this.note, [robot.status?.fault, robot.note].filter(Boolean).join("; "));
    this.holdButton.disabled = this.stopButton.disabled = !robot.connected;
    const known = [...this.select.options].map((option) => option.value).join();
    const features = robot.features ?? [];
    this.joints.hidden = !features.length;
    if (known !== features.map((feature) => feature.name).join()) {
      this.select.replaceChildren(...features.map((feature) => h("option", { value: feature.name }, feature.name)));
      this.choose(features[0]?.name ?? "");
    }
    for (const camera of robot.cameras ?? []) {
      if (!this.cameras.has(camera.name)) {
        const view = new CameraView(this.name, camera);
        this.cameras.set(camera.name, view);
        this.cameraList.append(view.element);
      }
    }
  }

  updateFacts(robot) {
    const run = latest(`${this.topic}:run`);
    const tick = latest(`${this.topic}:tick`);
    const facts = [
      ["Held by", robot.status?.lease_holder || "nobody"],
      robot.status?.authority && ["Authority", robot.status.authority],
      robot.status && ["Clamped", String(robot.status.clamped_count), "clamped"],
      robot.status && ["Refused", String(robot.status.refused_count), "refused"],
      robot.status && ["Watchdog holds", String(robot.status.hold_count), "holds"],
      robot.rate_hz && ["Control", `${num(robot.rate_hz)} Hz`],
      run && ["Run", run.connected ? `${run.state}${run.mode ? `, ${run.mode}` : ""}` : "actor away"],
      run?.detail && ["", run.detail],
      run && ["Succeeded", `${run.success_count} of ${run.finished_count} episodes${run.episode_count ? `, ${run.episode_count} wanted` : ""}`, "success"],
      run?.spooled_frame_count && ["Not yet stored", `${run.spooled_frame_count} frames`],
      tick && ["Queue", `${tick.queue_length} actions`],
      tick && ["Late by", ms(tick.lateness_ms)],
    ].filter(Boolean);
    this.facts.replaceChildren(...facts.map(([name, value, field]) => h("div", {}, h("dt", {}, name), h("dd", { "data-field": field }, value))));
  }

  updateResults() {
    this.results.replaceChildren(...values(`${this.topic}:results`).slice(-40).map((one) => {
      const text = `Episode ${one.episode_number}: ${one.success ? "success" : one.reason || "no success"}, ${one.frame_count} frames`
        + (one.versions.length ? `, ${one.versions.map(versionText).join(", ")}` : "") + (one.held_tick_count ? `, ${one.held_tick_count} ticks held` : "");
      return h("li", { class: one.success ? "good" : "bad", title: text, "aria-label": text }, one.success ? "✓" : "✕");
    }));
  }

  choose(feature) {
    this.feature = feature;
    this.select.value = feature;
    if (!this.plotted.has(feature)) this.plotted.set(feature, new Set(Array.from({ length: FIRST_PLOTTED }, (_, index) => index)));
    this.all.replaceChildren();
    this.updateAll();
  }

  described(robot) {
    return robot?.features?.find((feature) => feature.name === this.feature);
  }

  updateSamples(robot) {
    const sample = values(`${this.topic}:samples`).at(-1);
    if (!sample) return;
    for (const [name, number] of Object.entries(sample.pictures)) this.cameras.get(name)?.show(number);
    const feature = this.described(robot);
    const now = feature && sample.values[feature.name];
    if (!now) return;
    const chosen = [...this.plotted.get(feature.name)].filter((index) => index < now.length).sort((a, b) => a - b);
    if (this.legend.children.length !== chosen.length || this.legend.dataset.chosen !== `${feature.name} ${chosen}`) {
      this.legend.dataset.chosen = `${feature.name} ${chosen}`;
      this.legend.replaceChildren(...chosen.map((index) => h("li", { mark: seriesColour(index) }, h("span", {}, feature.elements[index]),
        h("output", { "data-element": feature.elements[index] }), h("span", { class: "unit" }, feature.units[index]))));
    }
    chosen.forEach((index, row) => write(this.legend.children[row].querySelector("output"), num(now[index])));
    this.updateAll();
  }

  updateAll() {
    const feature = this.described(latest(this.topic));
    if (!this.allDetails.open || !feature) return;
    const now = values(`${this.topic}:samples`).at(-1)?.values[feature.name] ?? [];
    if (!this.all.children.length) {
      const chosen = this.plotted.get(feature.name);
      this.all.replaceChildren(table(feature.name, ["Plot", "Element", "Value", "Unit"], feature.elements.map((element, index) => [
        h("input", { type: "checkbox", "aria-label": `Plot ${element}`, checked: chosen.has(index), onchange: (event) => {
          if (event.target.checked) chosen.add(index);
          else chosen.delete(index);
          this.drawPlot(latest(this.topic));
        } }),
        element, h("span", { "data-value": element }), feature.units[index],
      ]), { numeric: [2] }));
    }
    this.all.querySelectorAll("[data-value]").forEach((cell, index) => write(cell, num(now[index])));
  }

  drawPlot(robot) {
    const feature = this.described(robot);
    const samples = values(`${this.topic}:samples`);
    if (!feature || !samples.length) return;
    const now = nowS();
    const chosen = [...this.plotted.get(feature.name)].filter((index) => index < feature.elements.length);
    const units = [...new Set(chosen.map((index) => feature.units[index]).filter(Boolean))];
    lineChart(this.plot, {
      series: chosen.map((index) => ({
        colour: seriesColour(index),
        points: samples.map((sample) => ({ x: sample.t - now, y: sample.values[feature.name]?.[index] ?? null })),
      })),
      x: [-WINDOW_S, 0],
      xTicks: [-20, -15, -10, -5, 0].map((x) => ({ x, text: x ? `−${-x} s` : "now" })),
      xLabel: "",
      yLabel: units.length ? units.join(", ") : "",
    });
    const last = samples.at(-1).values[feature.name] ?? [];
    this.plot.setAttribute("aria-label", `${feature.name}: ${chosen.map((index) => `${feature.elements[index]} ${num(last[index])} ${feature.units[index]}`).join(", ")}`);
  }

  horizon = (chunk) => (latest("inference")?.models ?? []).find((model) => model.name === chunk.version?.model)?.chunk_horizon ?? null;

  drawTimeline(robot) {
    const chunks = values(`${this.topic}:chunks`);
    this.timeline.style.display = chunks.length ? "" : "none";
    if (chunks.length) chunkTimeline(this.timeline, chunks, { now: nowS(), windowS: WINDOW_S, horizon: this.horizon, rateHz: robot.rate_hz });
    const refused = chunks.findLast((chunk) => chunk.refusal);
    write(this.refusal, refused ? `Last refusal, ${ago(nowS() - refused.t)} ago, asked at tick ${refused.requested_tick}: ${refused.refusal}` : "");
  }

  updateChunks() {
    const chunks = values(`${this.topic}:chunks`);
    const newest = chunks.findLast((chunk) => !chunk.refusal);
    if (newest) {
      this.chunkNote.replaceChildren(h("p", { class: "soft", "data-field": "newest-chunk" }, "Newest: ", versionMark(newest.version),
        `, asked at tick ${newest.requested_tick}, came at ${newest.arrived_tick} after ${ms(newest.latency_ms)}`));
    } else {
      this.chunkNote.replaceChildren(empty(latest(`${this.topic}:run`)
        ? "No chunk yet: they appear when the actor runs a served policy." : "No actor is named for this robot: start the dashboard with --actor HOST:PORT."));
    }
    if (!this.chunkDetails.open) return;
    this.chunkTable.replaceChildren(table("Newest first", ["Asked at tick", "Came at tick", "For ticks", "Delay", "Used before", "Latency", "Version"],
      chunks.slice(-10).reverse().map((chunk) => {
        const span = chunk.refusal ? null : covers(chunk, this.horizon(chunk));
        return {
          class: chunk.refusal ? "bad" : null,
          cells: [String(chunk.requested_tick), chunk.refusal ? "refused" : String(chunk.arrived_tick), span ? `${span[0]}–${span[1]}` : "–",
            chunk.refusal ? "–" : `${chunk.delay_steps} steps`, String(chunk.used_count), ms(chunk.latency_ms),
            chunk.refusal || versionText(chunk.version)],
        };
      })));
  }

  async stop(how) {
    const latched = how === "emergency-stop";
    const agreed = await confirmed({
      title: latched ? `Emergency stop ${this.name}?` : `Hold ${this.name}?`,
      text: latched
        ? "It latches: every command is refused until somebody at the robot clears it there."
        : "The robot holds its position until the next valid command; a running actor goes on.",
      yes: latched ? "Stop it" : "Hold",
    });
    if (!agreed) return;
    try {
      const response = await fetch(`/api/robots/${encodeURIComponent(this.name)}/${how}`, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ confirm: this.name }),
      });
      const answer = await response.json();
      write(this.answer, response.ok ? `The robot answers: ${answer.mode}` : `Not done: ${answer.error}`);
    } catch (error) {
      write(this.answer, `Not done: the dashboard could not be reached (${error.message}). Use the stop at the robot.`);
    }
  }
}

// Draws the newest picture; while one is on its way, newer ones only replace the wish for the next.
class CameraView {
  constructor(robot, camera) {
    this.url = `/api/robots/${encodeURIComponent(robot)}/cameras/${encodeURIComponent(camera.name)}`;
    this.canvas = h("canvas", { role: "img", "aria-label": `Camera ${camera.name}`, width: camera.width, height: camera.height,
      ratio: `${camera.width} / ${camera.height}`, "data-camera": camera.name });
    this.element = h("figure", {}, this.canvas, h("figcaption", {}, `${camera.name.replace("observation.images.", "")}, ${camera.width}×${camera.height}`));
    this.shown = 0;
    this.wanted = 0;
    this.busy = false;
  }

  show(number) {
    this.wanted = number;
    if (!this.busy && !document.hidden) this.load();
  }

  async load() {
    this.busy = true;
    try {
      while (this.wanted !== this.shown) {
        const wanted = this.wanted;
        const response = await fetch(this.url);
        if (!response.ok) break;
        const picture = await createImageBitmap(await response.blob());
        this.canvas.width = picture.width;
        this.canvas.height = picture.height;
        this.canvas.getContext("2d").drawImage(picture, 0, 0);
        picture.close();
        this.shown = wanted;
        this.canvas.dataset.number = wanted;
      }
    } catch {
      // The next picture tries again.
    } finally {
      this.busy = false;
    }
  }
}
