// Dialogs: a title, fields, buttons. They keep the focus inside, and Escape closes them.

import { element } from "./dom.js";
import { text } from "./i18n.js";

let finishOpen = null; // ends the dialog that is open, if any

// Return whether a dialog is open.
export const isDialogOpen = () => finishOpen !== null;

// Show a dialog; resolves with the value of the pressed button, or null if it was closed, also by another dialog. A button
// has a label, and: `value`; `kind` if it submits the form (a class of its style), then `check` may keep the dialog open;
// or `run`, a function that is called while the dialog stays open.
export function ask(title, content, buttons) {
  finishOpen?.(null);
  return new Promise((resolve) => {
    // Each dialog has an element of its own: a browser reports its end late, when another one may be open.
    const dialog = element("dialog", { id: "dialog", "aria-labelledby": "dialog-title" });
    const finish = (value) => {
      if (finishOpen === finish) finishOpen = null;
      dialog.close();
      dialog.remove();
      resolve(value || null);
    };
    const onsubmit = (event) => {
      event.preventDefault();
      finish(event.submitter?.value);
    };
    const row = element("div", { class: "row end" }, ...buttons.map((button) => buttonNode(button, finish)));
    const form = element("form", { method: "dialog", onsubmit }, element("h2", { id: "dialog-title" }, title), ...content, row);
    dialog.append(form);
    dialog.addEventListener("close", () => finish(null)); // by Escape
    document.body.append(dialog);
    finishOpen = finish;
    dialog.showModal();
    (form.querySelector("[autofocus]") ?? form.querySelector("input, textarea, button"))?.focus();
  });
}

function buttonNode({ label, value, kind, check, run }, finish) {
  const onclick = (event) => {
    if (run) run();
    else if (!kind) finish(value);
    else if (check && !check()) event.preventDefault();
  };
  const type = kind ? "submit" : "button"; // Enter in a field presses the first submit button
  return element("button", { type, class: kind ?? "", value, onclick }, label);
}

export const cancelButton = () => ({ label: text("cancel"), value: "" });

export async function confirmDelete(title) {
  const answer = await ask(
    text("deleteConversation", { title }),
    [element("p", {}, text("deleteWarning"))],
    [cancelButton(), { label: text("delete"), value: "delete", kind: "danger" }],
  );
  return answer === "delete";
}

// Ask for the title of a conversation; resolves with it, or null.
export async function askTitle(title) {
  const input = element("input", { id: "title-input", value: title, maxlength: "200", autocomplete: "off", dir: "auto" });
  const save = { label: text("save"), value: "save", kind: "primary" };
  const label = element("label", { for: "title-input" }, text("title"));
  const answer = await ask(text("rename"), [label, input], [cancelButton(), save]);
  return answer === "save" ? input.value.trim() : null;
}

// Ask for the API key; resolves with it, or null.
export async function askKey(isWrong) {
  const input = element("input", { type: "password", id: "key-input", autocomplete: "off", autofocus: true });
  const answer = await ask(
    text("keyTitle"),
    [
      element("p", {}, isWrong ? text("keyWrong") : text("keyNeeded")),
      element("label", { for: "key-input" }, text("key")),
      input,
    ],
    [cancelButton(), { label: text("use"), value: "use", kind: "primary" }],
  );
  return answer === "use" ? input.value.trim() : null;
}
