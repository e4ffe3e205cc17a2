// Keys in the fields of the page.

import { byId } from "./dom.js";

// Return whether a key sends a text. On a touch screen Enter starts a line. Safari reports the Enter that ends the
// composition of a Chinese word with code 229 only.
export function isSendKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.altKey || event.isComposing || event.keyCode === 229) return false;
  return event.ctrlKey || event.metaKey || !matchMedia("(hover: none) and (pointer: coarse)").matches;
}

// Let the user write the next message; on a touch screen that would open the keyboard.
export function focusInput() {
  if (matchMedia("(pointer: fine)").matches) byId("input").focus();
}
