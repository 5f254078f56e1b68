// Asks before something is done that robots notice.

import { write } from "./dom.js";

// Resolves to whether the person agreed.
export function confirmed({ title, text, yes }) {
  const dialog = document.getElementById("confirm");
  write(document.getElementById("confirm-title"), title);
  write(document.getElementById("confirm-text"), text);
  const button = document.getElementById("confirm-yes");
  write(button, yes);
  button.className = "danger";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}
