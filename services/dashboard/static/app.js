// Ties the feed to the panels. Nothing here is loaded from elsewhere.

import { tellAges, write } from "./dom.js";
import { renderEpisodes } from "./episodes.js";
import { renderInference } from "./inference.js";
import { connect, isHeard, onChange } from "./live.js";
import { renderLatency, renderLearning, renderServices } from "./panels.js";
import { animateRobots, renderRobots } from "./robots.js";
import { learnRights, renderVersions } from "./versions.js";

const link = document.getElementById("link");

function showLink(isOpen) {
  link.dataset.state = isOpen ? "live" : "away";
  write(link, isOpen ? "Live" : "The dashboard's process is away; trying again…");
  if (isOpen) learnRights();
}

const changedAny = (changed, ...prefixes) => [...changed].some((topic) => prefixes.some((prefix) => topic.startsWith(prefix)));

onChange((changed) => {
  renderRobots(changed);
  if (changed.has("services")) renderServices();
  if (changedAny(changed, "inference", "configured")) renderInference();
  if (changedAny(changed, "robots") || [...changed].some((topic) => topic.endsWith(":latency"))) renderLatency();
  if (changedAny(changed, "inference", "versions", "configured")) renderVersions();
  if (changedAny(changed, "learner", "configured")) renderLearning();
  if (changedAny(changed, "datasets", "configured")) renderEpisodes();
  tellAges();
});

setInterval(animateRobots, 100);
setInterval(() => {
  if (link.dataset.state === "live" && !isHeard()) showLink(false);
  else if (link.dataset.state === "away" && isHeard()) showLink(true);
  renderServices();
  tellAges();
}, 1000);
new ResizeObserver(() => renderLearning()).observe(document.getElementById("learning"));

const root = document.documentElement;
const saved = localStorage.getItem("theme");
if (saved) root.dataset.theme = saved;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  renderLearning();
});

showLink(false);
write(link, "Connecting…");
connect(showLink);
