// One message of a conversation: its parts, and what can be done with it.

import { element } from "./dom.js";
import { count, decimal, duration, text } from "./i18n.js";
import { copy, MarkdownView } from "./markdown.js";
import * as store from "./store.js";

// Shows a message. `actions` has functions: edit, retry, continueAnswer, select (another version), sendResults.
export class MessageView {
  constructor(message, versions, actions, modelName) {
    this.message = message;
    this.actions = actions;
    const names = { user: text("you"), assistant: modelName, tool: text("tool") };
    this.content = element("div", { class: "content" });
    this.footer = element("div", { class: "row wrap footer" });
    this.node = element(
      "article",
      { class: `message ${message.role}`, "data-id": message.id },
      element("h2", {}, names[message.role] ?? message.role),
      this.content,
      this.footer,
    );
    this.versions = versions;
    if (message.role !== "assistant") this.showUser();
  }

  // Return whether this view shows a message as it is. Calls of tools do not: they ask for results only at the end of a branch.
  isStill(message, versions) {
    const isSame = this.message === message && this.versions.length === versions.length;
    return isSame && !this.isEdited && !message.toolCalls && (message.role !== "assistant" || this.isFinished);
  }

  showUser() {
    const { content } = this.message;
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    for (const part of parts) {
      if (part.type === "text") this.content.append(element("p", { class: "plain" }, part.text));
      else if (part.image_url) this.content.append(element("img", { class: "picture", src: part.image_url.url, alt: text("images") }));
    }
    this.showFooter(this.message.role === "user" ? [this.button("edit", () => this.edit())] : []);
  }

  edit() {
    const area = element("textarea", { rows: "4", "aria-label": text("message"), value: store.textOf(this.message.content) });
    const parts = typeof this.message.content === "string" ? [] : this.message.content.filter((part) => part.type !== "text");
    const send = () => {
      const content = area.value.trim();
      if (!content && !parts.length) return;
      this.actions.edit(this.message, parts.length ? [...parts, ...(content ? [{ type: "text", text: content }] : [])] : content);
    };
    const form = element(
      "form",
      {
        class: "edit",
        onsubmit: (event) => {
          event.preventDefault();
          send();
        },
        onkeydown: (event) => {
          if (event.key === "Escape") this.actions.redraw();
          else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            send();
          }
        },
      },
      area,
      element(
        "div",
        { class: "row end" },
        element("button", { type: "button", onclick: () => this.actions.redraw() }, text("cancel")),
        element("button", { type: "submit", class: "primary" }, text("sendAgain")),
      ),
    );
    this.isEdited = true;
    this.content.replaceChildren(form);
    this.footer.replaceChildren();
    area.focus();
  }

  // Show an answer as it is now; `answer` is set while it streams.
  update(answer = null) {
    const { message } = this;
    if (message.reasoning) this.showReasoning(message, answer);
    if (message.content) {
      if (!this.markdown) {
        this.markdown = new MarkdownView();
        this.content.append(this.markdown.node);
      }
      if (answer) this.markdown.update(message.content);
    }
    this.showCalls(message, answer);
    this.showProgress(answer);
  }

  // Show the end of an answer.
  async finish() {
    const { message } = this;
    this.update();
    if (this.markdown) await this.markdown.finish(message.content);
    this.isFinished = true;
    if (this.details) this.details.open = false;
    const buttons = [this.button("retry", () => this.actions.retry(message))];
    if (message.content) {
      buttons.unshift(this.button("copy", (event) => copy(message.content, event.target)));
      if (message.finish !== "stop" && !message.toolCalls?.length) {
        buttons.push(this.button("continueAnswer", () => this.actions.continueAnswer(message)));
      }
    }
    this.showFooter(buttons);
  }

  showReasoning(message, answer) {
    if (!this.details) {
      this.summary = element("summary", {});
      this.reasoning = element("div", { class: "plain reasoning" });
      this.details = element("details", {}, this.summary, this.reasoning);
      this.content.prepend(this.details);
    }
    const isThinking = answer && !message.content && message.thoughtSeconds === undefined;
    const seconds = decimal(message.thoughtSeconds ?? 0);
    this.summary.textContent = isThinking ? text("thinking") : text("thought", { seconds });
    const shown = this.reasoning.textContent.length;
    if (message.reasoning.length > shown) this.reasoning.append(message.reasoning.slice(shown));
  }

  showCalls(message, answer) {
    const calls = message.toolCalls ?? [];
    if (!calls.length) return;
    this.calls ??= this.content.appendChild(element("div", { class: "calls" }));
    if (answer) {
      this.calls.replaceChildren(...calls.map((call) => callNode(call)));
      return;
    }
    if (this.hasForm) return;
    this.hasForm = true;
    const needsResults = this.actions.needsResults(message);
    const areas = calls.map((call) => element("textarea", { rows: "2", "aria-label": `${text("toolResult")}: ${call.name}`, placeholder: text("enterResult") }));
    const nodes = calls.flatMap((call, index) => [callNode(call), needsResults ? areas[index] : null]);
    const send = element("button", { type: "submit", class: "primary" }, text("sendResults"));
    const form = element(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.actions.sendResults(message, areas.map((area) => area.value));
        },
      },
      ...nodes,
      needsResults ? send : null,
    );
    this.calls.replaceChildren(form);
  }

  showProgress(answer) {
    this.progress?.remove();
    this.progress = null;
    if (!answer) return;
    const { progress, notice } = answer;
    if (notice) {
      const line = notice.type === "resumed" ? text("ringBack") : text("ringNotice", { reason: notice.reason ?? "" });
      this.progress = element("p", { class: "notice", role: "status" }, line);
    } else if (progress && progress.processed < progress.total) {
      const done = progress.processed - progress.cache;
      const rest = done > 0 ? (progress.seconds / done) * (progress.total - progress.processed) : null;
      const line = text("reading", { done: count(progress.processed), total: count(progress.total) });
      this.progress = element(
        "p",
        { class: "progress" },
        element("progress", { max: progress.total, value: progress.processed, "aria-label": line }),
        rest > 2 ? `${line} · ${text("left", { time: duration(rest) })}` : line,
      );
    } else if (!this.message.content && !this.message.reasoning && !this.message.toolCalls) {
      this.progress = element("p", { class: "progress waiting" }, text("waitingForModel"));
    }
    if (this.progress) this.content.append(this.progress);
  }

  showFooter(buttons) {
    const { message } = this;
    const parts = [];
    if (this.versions.length > 1) parts.push(this.versionSwitch());
    parts.push(...buttons);
    const remark = remarkOf(message);
    if (remark) parts.push(element("span", { class: message.finish === "error" ? "error" : "remark" }, remark));
    if (message.usage) parts.push(element("span", { class: "statistics" }, statisticsOf(message)));
    this.footer.replaceChildren(...parts);
  }

  versionSwitch() {
    const index = this.versions.indexOf(this.message);
    const go = (offset, name, label) =>
      element(
        "button",
        {
          type: "button",
          class: "small",
          "aria-label": text(name),
          disabled: index + offset < 0 || index + offset >= this.versions.length,
          onclick: () => this.actions.select(this.versions[index + offset]),
        },
        label,
      );
    const position = text("versionOf", { number: index + 1, count: this.versions.length });
    return element("span", { class: "versions" }, go(-1, "previousVersion", "‹"), ` ${position} `, go(1, "nextVersion", "›"));
  }

  button(name, onclick) {
    return element("button", { type: "button", class: "small", onclick }, text(name));
  }
}

function callNode(call) {
  let json = call.arguments;
  try {
    json = JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    // still being written, or not JSON: shown as it is
  }
  const name = element("strong", {}, text("toolCall", { name: call.name }));
  return element("div", { class: "call" }, name, element("pre", { tabindex: "0" }, json));
}

function remarkOf(message) {
  if (message.role !== "assistant") return "";
  if (message.finish === "error") return errorText(message.error);
  if (message.finish === "stopped") return text("stoppedByUser");
  if (message.finish === "length") return text("lengthLimit");
  if (message.finish === null) return text("cutOff");
  return message.content || message.toolCalls?.length ? "" : text("emptyAnswer");
}

// Return the message for an error of the server.
export function errorText({ status, message, retryAfter }) {
  if (status === 0) return text("lostConnection");
  if (status === 401) return text("keyWrong");
  if (status === 429) return text("busy", { seconds: retryAfter ?? 5 });
  if (status === 503) return text("notUp", { reason: message });
  return text("failed", { message });
}

function statisticsOf({ usage, timings }) {
  const rate = timings?.predicted_per_second;
  return text("statistics", {
    tokens: count(usage.completion_tokens),
    rate: rate ? decimal(rate) : "–",
    prompt: count(usage.prompt_tokens),
    cached: count(usage.prompt_tokens_details?.cached_tokens ?? 0),
    first: timings ? duration(timings.prompt_ms / 1000) : "–",
  });
}
