// Markdown as the server renders it. This is the only place where HTML enters the document, through one Trusted Types policy.

import { request } from "./api.js";
import { element } from "./dom.js";
import { text } from "./i18n.js";

const policy = globalThis.trustedTypes?.createPolicy("page", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};

const MIN_INTERVAL_MS = 60;
const LOAD = 4; // a rendering may take a fifth of the time
const MAX_CHARS = 190_000;

// Shows a text that grows, block by block. Blocks that are finished are never touched again.
export class MarkdownView {
  constructor() {
    this.node = element("div", { class: "markdown" });
    this.text = "";
    this.finishedEnd = 0;
    this.tail = []; // elements of the blocks that may still change
    this.isRendering = false;
    this.isFinal = false;
    this.waiting = null;
  }

  // Show more of a text, which begins with what was shown.
  update(value) {
    this.text = value;
    this.schedule();
  }

  // Show the whole text; resolves when it is shown.
  async finish(value) {
    this.text = value;
    this.isFinal = true;
    return new Promise((resolve) => {
      this.onShown = resolve;
      this.schedule();
    });
  }

  schedule() {
    if (this.isRendering || this.waiting !== null) {
      if (this.isFinal && this.waiting !== null) {
        clearTimeout(this.waiting);
        this.waiting = null;
      } else return;
    }
    this.render();
  }

  async render() {
    this.isRendering = true;
    const { text: rendered, isFinal } = this;
    const start = performance.now();
    try {
      const rest = rendered.slice(this.finishedEnd, this.finishedEnd + MAX_CHARS);
      const isAll = this.finishedEnd + rest.length === rendered.length;
      const response = await request("page/render", { body: { text: rest, final: isFinal && isAll } });
      this.show((await response.json()).blocks, rest, isAll);
    } catch {
      this.showPlain(rendered);
    }
    this.isRendering = false;
    const isBehind = this.text !== rendered || this.isFinal !== isFinal;
    if (isBehind) {
      const pause = this.isFinal ? 0 : Math.max(MIN_INTERVAL_MS, LOAD * (performance.now() - start));
      this.waiting = setTimeout(() => {
        this.waiting = null;
        this.render();
      }, pause);
    } else if (isFinal) this.onShown?.();
  }

  show(blocks, rest, isAll) {
    for (const node of this.tail) node.remove();
    this.tail = [];
    let end = 0;
    for (const block of blocks) {
      const nodes = nodesOf(block.html);
      this.node.append(...nodes);
      if (block.finished || !isAll) end = block.end;
      else this.tail.push(...nodes);
    }
    this.finishedEnd += isAll ? end : rest.length;
  }

  // Show the text without formatting, because the server cannot be reached or refuses it.
  showPlain(value) {
    for (const node of this.tail) node.remove();
    this.tail = [element("p", { class: "plain" }, value.slice(this.finishedEnd))];
    this.node.append(...this.tail);
  }
}

function nodesOf(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  const nodes = [...template.content.childNodes];
  for (const node of nodes) {
    if (node.nodeType !== Node.ELEMENT_NODE) continue;
    const blocks = node.matches(".code") ? [node] : node.querySelectorAll(".code");
    for (const block of blocks) addCodeHeader(block);
  }
  return nodes;
}

function addCodeHeader(block) {
  const button = element("button", { type: "button", class: "small" }, text("copyCode"));
  button.addEventListener("click", () => copy(block.querySelector("code").textContent, button));
  block.querySelector("pre").tabIndex = 0;
  block.prepend(element("div", { class: "code-header" }, element("span", {}, block.dataset.language), button));
}

// Copy a text, and say so on the button.
export async function copy(value, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    copyBySelection(value); // without HTTPS there is no clipboard API
  }
  button.textContent = text("copied");
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

function copyBySelection(value) {
  const area = element("textarea", { class: "hidden-text" });
  area.value = value;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
