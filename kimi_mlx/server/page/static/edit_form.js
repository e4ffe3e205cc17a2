// The form in which a message is changed: its text and its files.

import { chipOf } from "./attachments.js";
import { element } from "./dom.js";
import { text } from "./i18n.js";
import { isSendKey } from "./keyboard.js";
import { textOf } from "./messages.js";

const MIN_ROWS = 3;
const MAX_ROWS = 15;

// Show a form for the content of a message in place of what `node` has. `onSend` receives the new content, `onCancel`
// nothing.
export function showEditForm(node, content, { onSend, onCancel }) {
  const area = textArea(textOf(content, { withFiles: false }));
  const chips = element("div", { class: "row wrap" });
  let files = typeof content === "string" ? [] : content.filter((part) => part.name || part.image_url);
  const showChips = () => chips.replaceChildren(...files.map((part) => chipOf(part, () => removeFile(part))));
  const removeFile = (part) => {
    files = files.filter((other) => other !== part);
    showChips();
    area.focus();
  };
  const send = () => {
    const written = area.value.trim();
    if (!files.length && !written) return;
    const parts = written ? [{ type: "text", text: written }] : [];
    onSend(files.length ? [...files, ...parts] : written);
  };
  const onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  const onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onCancel();
    } else if (isSendKey(event) && event.target === area) onsubmit(event);
  };
  const buttons = element(
    "div",
    { class: "row end" },
    element("button", { type: "button", onclick: onCancel }, text("cancel")),
    element("button", { type: "submit", class: "primary" }, text("send")),
  );
  showChips();
  node.replaceChildren(element("form", { class: "edit", onsubmit, onkeydown }, chips, area, buttons));
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function textArea(value) {
  const rows = Math.min(MAX_ROWS, Math.max(MIN_ROWS, value.split("\n").length));
  return element("textarea", { rows: String(rows), dir: "auto", "aria-label": text("message"), value });
}
