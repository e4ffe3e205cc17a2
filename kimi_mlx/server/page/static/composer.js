// The form below the conversation: text, files, images. Enter sends the message, Shift-Enter begins a new line.

import { Attachments } from "./attachments.js";
import { byId } from "./dom.js";
import { isSendKey } from "./keyboard.js";
import { tabStorage } from "./tab_storage.js";

const MAX_ROWS = 12;
const DRAFT = "kimi-mlx-draft"; // what is written survives a reload, which a phone does when it needs memory

export class Composer {
  // `onSend` receives the content of the message, `onStop` nothing, `onError` a text.
  constructor({ onSend, onStop, onError }) {
    this.onSend = onSend;
    this.input = byId("input");
    this.attachments = new Attachments(onError);
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", onStop);
    this.input.value = tabStorage.get(DRAFT);
    this.resize();
    this.input.addEventListener("input", () => {
      tabStorage.set(DRAFT, this.input.value);
      this.resize();
    });
    addEventListener("resize", () => this.resize()); // another width, or another size of the type
    this.input.addEventListener("keydown", (event) => this.onKey(event));
    this.input.addEventListener("paste", (event) => this.onPaste(event));
    this.connectPicker("attach", "files");
    this.connectPicker("camera", "camera-file");
    this.connectDrop();
  }

  set seesImages(value) {
    this.attachments.seesImages = value;
    byId("camera").hidden = !value;
  }

  connectPicker(button, input) {
    const picker = byId(input);
    byId(button).addEventListener("click", () => picker.click());
    picker.addEventListener("change", async () => {
      await this.attachments.add([...picker.files]);
      picker.value = "";
      this.input.focus();
    });
  }

  connectDrop() {
    const view = byId("chat-view");
    for (const name of ["dragenter", "dragover"]) {
      view.addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        view.classList.add("dropping");
      });
    }
    view.addEventListener("dragleave", (event) => {
      if (!view.contains(event.relatedTarget)) view.classList.remove("dropping");
    });
    view.addEventListener("drop", (event) => {
      view.classList.remove("dropping");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.attachments.add([...event.dataTransfer.files]);
    });
  }

  onKey(event) {
    if (!isSendKey(event)) return;
    event.preventDefault();
    this.send();
  }

  onPaste(event) {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    this.attachments.add(files);
  }

  send() {
    const message = this.input.value.trim();
    if (byId("send").hidden || (!message && !this.attachments.items.length)) return;
    const content = this.attachments.contentWith(message);
    this.clear();
    this.onSend(content);
  }

  clear() {
    this.input.value = "";
    tabStorage.set(DRAFT, "");
    this.attachments.clear();
    this.resize();
  }

  resize() {
    const { input } = this;
    const line = parseFloat(getComputedStyle(input).lineHeight) || 22;
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, line * MAX_ROWS)}px`;
  }
}
