// Recorded episodes, newest first, and their videos side by side.

import { bytes, code, empty, h, table, versionMark, write } from "./dom.js";
import { latest } from "./live.js";

const PAGE = 15;
const body = document.getElementById("episodes-body");
const select = h("select", { "aria-label": "Dataset", onchange: () => open(select.value) });
const facts = h("p", { class: "soft" });
const list = h("div");
const stage = h("div");
const newer = h("button", { type: "button", onclick: () => turn(-1) }, "Newer");
const older = h("button", { type: "button", onclick: () => turn(1) }, "Older");
const pager = h("div", { class: "row" }, newer, older);

let dataset = null;
let page = 0;
let loadedCount = -1;
let loading = false;

export function renderEpisodes() {
  const datasets = latest("datasets");
  if (!datasets?.length) {
    const configured = latest("configured")?.store;
    body.replaceChildren(!configured ? empty("No store is named: ", code("--store HOST:PORT"), ".")
      : datasets ? empty("No dataset yet: an actor that records makes one.") : empty("The dataset store has not answered yet."));
    dataset = null;
    return;
  }
  if (!select.isConnected) body.replaceChildren(h("div", { class: "row spread" }, select, facts), stage, list, pager);
  const names = datasets.map((one) => one.name);
  if ([...select.options].map((option) => option.value).join() !== names.join()) {
    select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  }
  if (!names.includes(dataset)) open(names.at(-1));
  const shown = datasets.find((one) => one.name === dataset);
  select.value = dataset;
  write(facts, `${shown.episode_count} episodes, ${shown.frame_count} frames, ${bytes(shown.size_bytes)}`
    + (shown.recording_count ? `, ${shown.recording_count} being recorded` : "") + (shown.sealed_count ? `, ${shown.sealed_count} waiting to be published` : ""));
  if (shown.episode_count !== loadedCount) load(shown);
}

function open(name) {
  dataset = name;
  page = 0;
  loadedCount = -1;
  stage.replaceChildren();
  renderEpisodes();
}

function turn(pages) {
  page += pages;
  loadedCount = -1;
  renderEpisodes();
}

async function load(info) {
  if (loading) return;
  loading = true;
  try {
    const end = Math.max(0, info.episode_count - page * PAGE);
    const begin = Math.max(0, end - PAGE);
    const response = await fetch(`/api/datasets/${encodeURIComponent(info.name)}/episodes?from=${begin}&limit=${Math.max(1, end - begin)}`);
    const answer = await response.json();
    if (!response.ok) {
      list.replaceChildren(empty(`The episodes cannot be read: ${answer.error}`));
      return;
    }
    loadedCount = info.episode_count;
    newer.disabled = page === 0;
    older.disabled = begin === 0;
    pager.hidden = info.episode_count <= PAGE;
    list.replaceChildren(answer.episodes.length ? rows(info, answer.episodes.filter((one) => one.index < end).reverse())
      : empty("No published episode yet: one appears here soon after it is sealed."));
  } catch {
    // The dashboard went away; the next news of the store tries again.
  } finally {
    loading = false;
  }
}

function rows(info, episodes) {
  return table("Newest first", ["", "Episode", "Task", "Robot", "Outcome", "Length", "Versions"], episodes.map((episode) => ({
    "data-episode": episode.index,
    cells: [
      episode.videos.length ? h("button", { type: "button", "aria-label": `Play episode ${episode.index}`, onclick: () => play(info, episode) }, "▶") : "",
      String(episode.index), episode.tasks.join("; "), episode.robot_id, outcome(episode.reason),
      `${(episode.frame_count / info.rate_hz).toFixed(1)} s`,
      episode.versions.length ? h("span", { class: "row" }, episode.versions.map(versionMark)) : "teleoperated",
    ],
  })), { numeric: [1, 5] });
}

function outcome(reason) {
  const style = { success: "good", failure: "bad" }[reason] ?? "";
  return h("span", { class: `badge ${style}` }, reason || "unknown");
}

// An episode is a span of longer video files: one per camera, all moved together.
function play(info, episode) {
  const videos = episode.videos.map((span) => ({
    span,
    element: h("video", { preload: "auto", muted: true, playsinline: true, "data-video": span.feature, "aria-label": `${span.feature} of episode ${episode.index}`,
      src: `/api/datasets/${encodeURIComponent(info.name)}/files/${span.path.split("/").map(encodeURIComponent).join("/")}` }),
  }));
  const length = Math.max(...episode.videos.map((span) => span.to_s - span.from_s));
  const [lead] = videos;
  const toggle = h("button", { type: "button", onclick: () => (lead.element.paused ? resume() : pause()) }, "Play");
  const clock = h("output", { "data-field": "position" });
  const scrub = h("input", { type: "range", min: 0, max: episode.frame_count - 1, step: 1, value: 0, "aria-label": "Frame of the episode",
    oninput: () => {
      pause();
      // The middle of a frame: at its edge, rounding decides which one is shown.
      seek((Number(scrub.value) + 0.5) / info.rate_hz);
    } });
  const note = h("p", { class: "refusal", role: "status" });

  const position = () => lead.element.currentTime - lead.span.from_s;
  const seek = (seconds) => videos.forEach(({ element, span }) => {
    element.currentTime = span.from_s + Math.min(seconds, Math.max(0, span.to_s - span.from_s - 0.5 / info.rate_hz));
  });
  const pause = () => videos.forEach(({ element }) => element.pause());
  const resume = () => {
    if (position() >= length - 1 / info.rate_hz) seek(0);
    videos.forEach(({ element }) => element.play().catch(() => {}));
  };
  const show = () => {
    if (!lead.element.isConnected) return;
    const at = Math.min(Math.max(0, position()), length);
    const frame = Math.min(episode.frame_count - 1, Math.floor(at * info.rate_hz + 1e-3));
    if (document.activeElement !== scrub || !lead.element.paused) scrub.value = frame;
    write(clock, `${at.toFixed(1)} of ${length.toFixed(1)} s, frame ${frame}`);
    // The file goes on with the next episode: this one ends half a frame before it.
    if (!lead.element.paused && position() >= length - 0.5 / info.rate_hz) pause();
    requestAnimationFrame(show);
  };
  lead.element.addEventListener("play", () => write(toggle, "Pause"));
  lead.element.addEventListener("pause", () => write(toggle, "Play"));
  videos.forEach(({ element, span }) => {
    element.muted = true;
    element.addEventListener("loadedmetadata", () => {
      element.currentTime = span.from_s;
      element.play().catch(() => {});
    }, { once: true });
    element.addEventListener("error", () => write(note, `${span.feature} cannot be played: ${element.error?.message || "the file did not come"}`));
  });
  stage.replaceChildren(h("div", { class: "player", "data-playing": episode.index, role: "group", "aria-label": `Episode ${episode.index}` },
    h("div", { class: "row spread" }, h("h4", {}, `Episode ${episode.index}: ${episode.tasks.join("; ")}`),
      h("button", { type: "button", class: "quiet", onclick: () => stage.replaceChildren() }, "Close")),
    h("div", { class: "pictures" }, videos.map(({ element, span }) => h("figure", {}, element, h("figcaption", {}, span.feature.replace("observation.images.", ""))))),
    h("div", { class: "row" }, toggle, scrub, clock), note));
  requestAnimationFrame(show);
}
