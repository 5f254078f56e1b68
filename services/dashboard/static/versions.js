// Policy versions: what is served, what there is, and swapping between them where this page may.

import { confirmed } from "./dialog.js";
import { age, code, drawIfChanged, empty, h, ms, num, table, versionMark, write } from "./dom.js";
import { latest, values } from "./live.js";

const SWAPS_SHOWN = 8;
const PUBLISHED_SHOWN = 10;
let rights = { swap: false, why_not: "" };
let swapping = "";

export async function learnRights() {
  try {
    rights = await (await fetch("/api/rights")).json();
  } catch {
    return; // Asked for again when the page is back.
  }
  renderVersions();
}

export function renderVersions() {
  const configured = latest("configured") ?? {};
  const server = latest("inference");
  const published = values("versions").at(-1) ?? [];
  const swaps = server?.swaps ?? [];
  const shownSwaps = swaps.slice(-SWAPS_SHOWN).reverse();
  const shownPublished = published.slice(-PUBLISHED_SHOWN).reverse();
  const models = (server?.models ?? []).map((model) => ({ ...model, pinned: Boolean(server.loads[model.name]?.pinned), back: backTo(model, swaps, published) }));
  const served = models.map((model) => model.version);
  const key = [configured, rights, swapping, models, published.length, shownPublished, swaps.length, shownSwaps.map(({ t, ...rest }) => rest)];
  drawIfChanged(document.getElementById("versions-body"), key, () => [
    ...servedPart(models, configured),
    ...(shownSwaps.length ? [h("h4", {}, "Swaps"), table("Newest first", ["Version", "When", "Pause", "Result"], shownSwaps.map((swap) => ({
      class: swap.accepted ? null : "bad",
      "data-swap": swap.version?.number ?? 0,
      cells: [versionMark(swap.version), age(swap.t), swap.accepted ? ms(swap.pause_ms) : "–", swap.accepted ? "served" : `refused: ${swap.reason}`],
    })), { numeric: [2] })] : []),
    h("h4", {}, "Published"),
    shownPublished.length ? table(`Newest first, ${published.length} in all`, ["Version", "", "When", "Step", "Loss", "Digest"], shownPublished.map((one) => ({
      "data-published": one.version.number,
      "data-model": one.version.model,
      cells: [versionMark(one.version), use(one, models, served), age(one.t), metricOf(one, "train/step"), metricOf(one, "train/loss"), one.version.digest],
    })), { numeric: [3, 4] })
      : configured.weights ? empty("Nothing is published yet: a learner publishes while it trains.") : empty("No weights service is named: ", code("--weights HOST:PORT"), "."),
  ]);
}

function servedPart(models, configured) {
  const head = h("h4", {}, "Served");
  if (!models.length) {
    return [head, configured.inference ? empty("The inference service serves nothing, or is not there yet.") : empty("No inference service is named: ", code("--inference HOST:PORT"), ".")];
  }
  const rows = models.map((model) => ({
    "data-served": model.name,
    cells: [h("span", { class: "row" }, versionMark(model.version ?? { model: model.name, number: 0, digest: "" }), model.pinned && h("span", { class: "badge warn", title: "newer versions do not replace it" }, "held")),
      h("span", { class: "row" },
        model.back ? swapButton(model, model.back, `Roll back to v${model.back}`, true) : null,
        model.pinned && swapButton(model, 0, "Go on with the newest", false)),
      model.policy_type, `${model.chunk_horizon} actions`, num(model.parameter_count, 3), model.version?.digest ?? "–"],
  }));
  return [head, table("What acts on robots now", ["Version", "", "Type", "Horizon", "Parameters", "Digest"], rows, { numeric: [3, 4] }),
    !rights.swap && rights.why_not && h("p", { class: "soft", "data-field": "no-swaps" }, `Swapping from this page: ${rights.why_not}.`)].filter(Boolean);
}

function use(one, models, served) {
  if (served.some((other) => same(other, one.version))) return "served";
  const model = models.find((candidate) => candidate.name === one.version.model);
  return model ? swapButton(model, one.version.number, "Swap", false) : "";
}

function swapButton(model, to, text, isQuiet) {
  if (!rights.swap) return null;
  const from = model.version?.number ?? 0;
  const target = to ? `v${to}` : "the newest version";
  const label = text === "Swap" ? `Swap ${model.name} to ${target}` : `${text}, ${model.name}`;
  return h("button", { type: "button", class: isQuiet ? "small quiet" : "small", disabled: Boolean(swapping), "aria-label": label,
    onclick: () => swap(model, from, to, target) }, swapping === `${model.name} ${to}` ? "Swapping…" : text);
}

async function swap(model, from, to, target) {
  const isOlder = to > 0 && to < from;
  const agreed = await confirmed({
    title: `Swap ${model.name} from v${from} to ${target}?`,
    text: "Every robot that this model serves gets its next chunks from that version, without a pause. It is checked first; one that does not fit is refused and nothing changes."
      + (isOlder ? ` Versions published later will not replace ${target} until somebody goes on with the newest.` : ""),
    yes: "Swap",
  });
  if (!agreed) return;
  const note = document.getElementById("swap-answer");
  swapping = `${model.name} ${to}`;
  note.dataset.state = "running";
  write(note, `${model.name}: from v${from} to ${target}; it is fetched and checked…`);
  renderVersions();
  try {
    const response = await fetch(`/api/models/${encodeURIComponent(model.name)}/swap`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ confirm: model.name, from, to }),
    });
    const answer = await response.json();
    note.dataset.state = response.ok ? "done" : "refused";
    write(note, response.ok ? `${model.name}: v${answer.previous?.number ?? 0} → v${answer.current?.number ?? 0}, pause ${ms(answer.pause_ms)}` : `Not swapped, v${from} goes on serving: ${answer.error}`);
  } catch (error) {
    note.dataset.state = "refused";
    write(note, `The dashboard could not be reached (${error.message}); what serves is in the table when it is back.`);
  } finally {
    swapping = "";
    renderVersions();
  }
}

// The version to go back to: the one served before the present one, else the newest older one there is; 0 for none.
function backTo(model, swaps, published) {
  const now = model.version?.number ?? 0;
  const older = (versions) => versions.filter((one) => one?.model === model.name && one.number > 0 && one.number < now).map((one) => one.number);
  return older(swaps.filter((one) => one.accepted).map((one) => one.version)).at(-1) ?? Math.max(0, ...older(published.map((one) => one.version)));
}

const same = (a, b) => a && b && a.model === b.model && a.number === b.number && a.digest === b.digest;
const metricOf = (one, name) => (one.metrics[name] === undefined ? "–" : num(one.metrics[name]));
