// Markdown as the server renders it. This is the only place where HTML enters the document, through one Trusted Types policy.

import { request } from "./api.js";
import { element } from "./dom.js";
import { text } from "./i18n.js";

const policy = globalThis.trustedTypes?.createPolicy("page", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};

const MIN_INTERVAL_MS = 60;
const PAUSE_FACTOR = 4; // pause after a rendering, as a multiple of its duration: rendering takes a fifth of the time
const SLICE_CHARS = 16_000; // per request: a long text appears from its beginning
const MAX_CHARS = 100_000; // of one block; a longer one is plain
const REFERENCE = /^ {0,3}\[[^\]\n]+\]:/m; // the target of links anywhere in the text
const MAX_REQUESTS = 2;

// Shows a text that grows, block by block. Blocks that are finished are never touched again.
export class MarkdownView {
  constructor() {
    this.node = element("div", { class: "markdown" });
    this.text = "";
    this.finishedEnd = 0;
    this.size = SLICE_CHARS;
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
    if (this.finishedEnd && value.length <= MAX_CHARS && REFERENCE.test(value)) this.restart();
    if (!this.node.childElementCount) this.showPlain(); // until it is rendered
    return new Promise((resolve) => {
      this.onShown = resolve;
      this.schedule();
    });
  }

  // Render the text from its beginning: references link all of it. What is shown stays until then.
  restart() {
    this.finishedEnd = 0;
    this.size = MAX_CHARS;
    this.tail = [...this.node.childNodes];
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
    const { finishedEnd: begin, text: rendered, isFinal } = this;
    const isLive = !isFinal;
    if (!isLive) await turn();
    const start = performance.now();
    const rest = rendered.slice(begin, begin + this.size);
    const isAll = begin + rest.length === rendered.length;
    let isMore = !isAll;
    try {
      const response = await request("page/render", { body: { text: rest, final: isFinal && isAll } });
      const { blocks } = await response.json();
      if (this.finishedEnd === begin) isMore = this.show(blocks, isAll);
    } catch {
      this.showPlain();
      isMore = false;
    }
    if (!isLive) nextTurn();
    this.isRendering = false;
    if (isMore) this.render();
    else if (this.text !== rendered || this.isFinal !== isFinal || this.finishedEnd < begin) {
      const pause = this.isFinal ? 0 : Math.max(MIN_INTERVAL_MS, PAUSE_FACTOR * (performance.now() - start));
      this.waiting = setTimeout(() => {
        this.waiting = null;
        this.render();
      }, pause);
    } else if (isFinal) this.onShown?.();
  }

  // Show rendered blocks; returns whether more of the text can be rendered.
  show(blocks, isAll) {
    for (const node of this.tail) node.remove();
    this.tail = [];
    let end = 0;
    for (const block of blocks) {
      if (!block.finished && !isAll) break; // cut off by the size
      const nodes = nodesOf(block.html);
      this.node.append(...nodes);
      if (block.finished) end = block.end;
      else this.tail.push(...nodes);
    }
    this.finishedEnd += end;
    if (isAll) return false;
    if (end) return true;
    this.size *= 2;
    if (this.size <= MAX_CHARS) return true;
    this.size = MAX_CHARS;
    this.showPlain();
    return false;
  }

  // Show the rest of the text without formatting: it is not rendered yet, or the server does not do it.
  showPlain() {
    for (const node of this.tail) node.remove();
    this.tail = [element("p", { class: "plain", dir: "auto" }, this.text.slice(this.finishedEnd))];
    this.node.append(...this.tail);
  }
}

// Texts that are complete are rendered in turn, a few at a time: a long conversation does not block an answer.
const turns = [];
let requests = 0;

function turn() {
  requests += 1;
  return requests <= MAX_REQUESTS ? null : new Promise((resolve) => turns.push(resolve));
}

function nextTurn() {
  requests -= 1;
  turns.shift()?.();
}

const PARAGRAPHS = "p, h1, h2, h3, h4, h5, h6, ul, ol, blockquote, table";

function nodesOf(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  for (const node of template.content.querySelectorAll(PARAGRAPHS)) node.dir = "auto"; // Arabic, Hebrew
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

// Return a text as a code block of Markdown, with a fence longer than any in the text.
export function fenced(code, language = "") {
  const longest = (code.match(/`{3,}/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${code}${code.endsWith("\n") ? "" : "\n"}${fence}`;
}

// Copy a text, and say on the button whether that worked.
export async function copy(value, button) {
  const label = (button.dataset.label ??= button.textContent);
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    isCopied = copyBySelection(value); // without HTTPS there is no clipboard API
  }
  button.textContent = isCopied ? text("copied") : text("notCopied");
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

function copyBySelection(value) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "hidden-text", readonly: "" }); // no keyboard on a phone
  area.value = value;
  document.body.append(area);
  area.focus();
  area.setSelectionRange(0, value.length);
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return isCopied;
}
