// The header: the state of the server, and a banner with messages.

import { byId } from "./dom.js";
import { text } from "./i18n.js";

const BANNER_MS = 8000;

let bannerTimer = null;

// Show a message below the header, or none; it disappears after a while unless `isLasting`.
export function showBanner(message, isLasting = false) {
  const banner = byId("banner");
  clearTimeout(bannerTimer);
  banner.textContent = message;
  banner.hidden = !message;
  banner.classList.toggle("passing", !isLasting);
  if (message && !isLasting) bannerTimer = setTimeout(() => showBanner(""), BANNER_MS);
}

// Show the state of the server. `kind` is its colour, or `key` if the server needs a key; `title` is a tooltip.
export function showState(kind, label, title = "") {
  const state = byId("state");
  if (state.textContent !== label) state.textContent = label;
  state.dataset.kind = kind;
  state.title = title;
  byId("enter-key").hidden = kind !== "key";
}

// Show a status that the server has sent.
export function showStatus(status) {
  if (!status.is_up) {
    showState("bad", status.backend === "ring" ? text("stateRestarting") : text("stateDown"), status.reason ?? "");
    return;
  }
  const parts = [];
  if (status.active) parts.push(text("stateBusy", { active: status.active }));
  if (status.waiting) parts.push(text("stateQueue", { waiting: status.waiting }));
  showState(parts.length ? "busy" : "good", parts.join(" · ") || text("stateReady"));
}
