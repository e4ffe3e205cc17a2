// Calls of tools in an answer, and the form for their results.

import { element } from "./dom.js";
import { text } from "./i18n.js";

// Return a call, which may still be incomplete.
export function callNode(call) {
  let json = call.arguments;
  try {
    json = JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    // incomplete, or not JSON: shown as it is
  }
  const remark = call.broken ? ` (${text("brokenCall")})` : "";
  const name = element("strong", {}, text("toolCall", { name: call.name }) + remark);
  return element("div", { class: "call" }, name, element("pre", { tabindex: "0" }, json));
}

// Return a form with calls, and a field for the result of each that is not broken. `onSend` receives the results in order.
export function resultsForm(calls, onSend) {
  const areas = [];
  const nodes = calls.flatMap((call) => {
    if (call.broken) return [callNode(call)];
    const label = text("toolResult", { name: call.name });
    areas.push(element("textarea", { rows: "2", "aria-label": label, placeholder: text("enterResult") }));
    return [callNode(call), areas.at(-1)];
  });
  const onsubmit = (event) => {
    event.preventDefault();
    onSend(areas.map((area) => area.value));
  };
  const button = element("button", { type: "submit", class: "primary" }, text("sendResults"));
  return element("form", { onsubmit }, ...nodes, button);
}
