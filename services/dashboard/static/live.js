// The live feed: topics and their values, kept in step with the server over one WebSocket.

const topics = new Map();
const listeners = [];
let clockOffset = 0;
let heardAt = 0;
let pauseMs = 250;

// Seconds on the server's clock, which every "t" is on.
export const nowS = () => performance.now() / 1000 + clockOffset;
export const values = (topic) => topics.get(topic) ?? [];
export const latest = (topic) => values(topic).at(-1);
// Whether the dashboard's own process was heard from lately.
export const isHeard = () => heardAt > 0 && performance.now() - heardAt < 8000;

// react(changed) is called at most once a drawn frame, with the set of topics that changed.
export function onChange(react) {
  listeners.push(react);
}

const changed = new Set();
let drawing = 0;

function notify(names) {
  names.forEach((name) => changed.add(name));
  // A tab in the background draws nothing; what changed is drawn when it comes back.
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    const now = new Set(changed);
    changed.clear();
    listeners.forEach((react) => react(now));
  });
}

function take(message) {
  heardAt = performance.now();
  clockOffset = message.now - performance.now() / 1000;
  for (const [name, change] of Object.entries(message.topics)) {
    const before = change.reset ? [] : values(name);
    topics.set(name, before.concat(change.values).slice(-change.keep));
  }
  notify(Object.keys(message.topics));
}

export function connect(onLink) {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const socket = new WebSocket(`${scheme}://${location.host}/api/live`);
  socket.onopen = () => {
    pauseMs = 250;
    onLink(true);
  };
  socket.onmessage = (event) => take(JSON.parse(event.data));
  socket.onclose = () => {
    onLink(false);
    setTimeout(() => connect(onLink), pauseMs);
    pauseMs = Math.min(pauseMs * 2, 3000);
  };
}
