// Markdown, which the server renders. This is the only place where HTML enters the document, through one Trusted Types policy.

import { request } from "./api.js";
import { copy } from "./clipboard.js";
import { element } from "./dom.js";
import { text } from "./i18n.js";

const policy = globalThis.trustedTypes?.createPolicy("page", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};

const MIN_INTERVAL_MS = 60;
const PAUSE_FACTOR = 4; // pause after a rendering, as a multiple of its duration: rendering takes a fifth of the time
const SLICE_CHARS = 16_000; // per request: a long text appears from its beginning
const MAX_CHARS = 100_000; // of one block; a longer one is plain
const REFERENCE = /^ {0,3}\[[^\]\n]+\]:/m; // defines links of the whole text
const MAX_REQUESTS = 2; // for complete texts, at the same time
const PLAIN_AFTER_MS = 2000; // browsers have six connections to a server, and answers may need them all

// Shows a text that grows, block by block. Blocks that are finished are never touched again.
export class MarkdownView {
  constructor() {
    this.node = element("div", { class: "markdown" });
    this.text = "";
    this.finishedEnd = 0;
    this.sliceChars = SLICE_CHARS;
    this.tail = []; // elements of the blocks that may still change
    this.isRendering = false;
    this.isFinal = false;
    this.timer = null;
  }

  // Show a longer version of the text.
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

  // Render the text again from its beginning, for its links by reference. What is shown stays until that is done.
  restart() {
    this.finishedEnd = 0;
    this.sliceChars = MAX_CHARS;
    this.tail = [...this.node.childNodes];
  }

  schedule() {
    if (this.isRendering || this.timer !== null) {
      if (this.isFinal && this.timer !== null) {
        clearTimeout(this.timer);
        this.timer = null;
      } else return;
    }
    this.render();
  }

  async render() {
    this.isRendering = true;
    const { finishedEnd: begin, text: rendered, isFinal } = this;
    if (isFinal) await acquireSlot();
    const start = performance.now();
    const rest = rendered.slice(begin, begin + this.sliceChars);
    const isAll = begin + rest.length === rendered.length;
    let isMore = !isAll;
    const plain = setInterval(() => this.showPlain(), PLAIN_AFTER_MS);
    try {
      const response = await request("page/render", { body: { text: rest, final: isFinal && isAll } });
      const { blocks } = await response.json();
      if (this.finishedEnd === begin) isMore = this.show(blocks, isAll);
    } catch {
      this.showPlain();
      isMore = false;
    }
    clearInterval(plain);
    if (isFinal) releaseSlot();
    this.isRendering = false;
    if (isMore) this.render();
    else if (this.text !== rendered || this.isFinal !== isFinal || this.finishedEnd < begin) {
      const pause = this.isFinal ? 0 : Math.max(MIN_INTERVAL_MS, PAUSE_FACTOR * (performance.now() - start));
      this.timer = setTimeout(() => {
        this.timer = null;
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
    this.sliceChars *= 2;
    if (this.sliceChars <= MAX_CHARS) return true;
    this.sliceChars = MAX_CHARS;
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

// Complete texts are rendered a few at a time, so that a long conversation does not delay the answer in progress.
const waiting = [];
let numRequests = 0;

function acquireSlot() {
  numRequests += 1;
  return numRequests <= MAX_REQUESTS ? null : new Promise((resolve) => waiting.push(resolve));
}

function releaseSlot() {
  numRequests -= 1;
  waiting.shift()?.();
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

// Return code as a code block of Markdown, with a fence longer than any in the code.
export function fenced(code, language = "") {
  const longest = (code.match(/`{3,}/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${code}${code.endsWith("\n") ? "" : "\n"}${fence}`;
}
