// Copying text.

import { element } from "./dom.js";
import { text } from "./i18n.js";

const SHOWN_MS = 1500;

// Copy a text, and show on the button whether that worked.
export async function copy(value, button) {
  const label = (button.dataset.label ??= button.textContent);
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    isCopied = copyBySelection(value); // over plain HTTP there is no clipboard API
  }
  button.textContent = isCopied ? text("copied") : text("notCopied");
  setTimeout(() => {
    button.textContent = label;
  }, SHOWN_MS);
}

function copyBySelection(value) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "hidden-text", readonly: "" }); // readonly: no keyboard appears on a phone
  area.value = value;
  document.body.append(area);
  area.focus();
  area.setSelectionRange(0, value.length);
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return isCopied;
}
