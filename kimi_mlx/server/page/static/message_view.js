// One message of a conversation: its parts, its footer, and its buttons.

import { errorText } from "./api.js";
import { copy } from "./clipboard.js";
import { element } from "./dom.js";
import { showEditForm } from "./edit_form.js";
import { bytes, count, decimal, duration, text } from "./i18n.js";
import { fenced, MarkdownView } from "./markdown.js";
import { canContinue, textOf } from "./messages.js";
import { callNode, resultsForm } from "./tool_calls.js";

// Shows a message. `actions` has functions: beginEdit, edit, retry, continueAnswer, select (another version), sendResults.
export class MessageView {
  constructor(message, versions, actions, modelName) {
    this.message = message;
    this.actions = actions;
    const names = { user: text("you"), assistant: modelName, tool: text("tool") };
    this.content = element("div", { class: "content" });
    this.footer = element("div", { class: "row wrap footer" });
    this.node = element(
      "article",
      { class: `message ${message.role}${message.isJson ? " json" : ""}`, "data-id": message.id },
      element("h2", {}, names[message.role] ?? message.role),
      this.content,
      this.footer,
    );
    this.versions = versions;
    if (message.role !== "assistant") this.showContent();
  }

  showName(modelName) {
    if (this.message.role === "assistant") this.node.firstChild.textContent = modelName;
  }

  // Return whether this view can stay: it shows the message as it is now, or has a form in which the user may be writing.
  // The form for results of tools depends on the branch.
  isCurrent(message, versions) {
    if (this.isEdited !== undefined) return this.isEdited; // false after an edit that was cancelled
    const isSame = this.message === message && this.versions.length === versions.length;
    const needsForm = Boolean(this.hasForm) && this.actions.needsResults(message);
    return isSame && (!message.toolCalls || needsForm) && (message.role !== "assistant" || this.isFinished);
  }

  // Show a message of the user, or the result of a tool.
  showContent() {
    const { content, role, name } = this.message;
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    if (role === "tool" && name) this.node.firstChild.textContent = `${text("tool")}: ${name}`;
    for (const part of parts) {
      if (part.image_url) {
        this.content.append(element("img", { class: "picture", src: part.image_url.url, alt: part.name ?? text("image") }));
      } else if (part.name) this.content.append(fileNode(part));
      else if (role === "tool") this.content.append(element("pre", { class: "result", tabindex: "0" }, part.text));
      else this.content.append(element("p", { class: "plain", dir: "auto" }, part.text));
    }
    if (role !== "user") return this.showFooter([]);
    const copied = textOf(content, { withFiles: false });
    const copyButtons = copied ? [button(text("copy"), (event) => copy(copied, event.target))] : [];
    this.showFooter([...copyButtons, button(text("edit"), () => this.edit())]);
  }

  // Show a form that changes the message.
  edit() {
    this.isEdited = true;
    this.footer.replaceChildren();
    this.actions.beginEdit();
    showEditForm(this.content, this.message.content, {
      onSend: (content) => this.actions.edit(this.message, content),
      onCancel: async () => {
        this.isEdited = false;
        await this.actions.redraw();
        document.querySelector(`[data-id="${this.message.id}"] button`)?.focus();
      },
    });
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
      if (answer) this.markdown.update(this.markdownText);
    }
    this.showCalls(message, answer);
    this.showProgress(answer);
    if (answer?.isElsewhere) this.footer.replaceChildren(element("span", { class: "remark" }, text("inOtherTab")));
  }

  // Text of the answer as Markdown: an answer that keeps to a schema is code.
  get markdownText() {
    const { content, isJson } = this.message;
    return isJson ? fenced(content, "json") : content;
  }

  // Show the complete answer, with its buttons.
  async finish() {
    const { message } = this;
    this.update();
    if (this.markdown) await this.markdown.finish(this.markdownText);
    this.isFinished = true;
    if (this.details) this.details.open = false;
    const buttons = [button(text("retry"), () => this.actions.retry(message))];
    if (message.content) {
      buttons.unshift(button(text("copy"), (event) => copy(message.content, event.target)));
      if (message.finish !== "stop" && canContinue(message)) {
        buttons.push(button(text("continueAnswer"), () => this.actions.continueAnswer(message)));
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
    this.summary.textContent = isThinking ? text("thinking") : thoughtOf(message.thoughtSeconds);
    const shown = this.reasoning.textContent.length;
    if (message.reasoning.length > shown) this.reasoning.append(message.reasoning.slice(shown));
  }

  showCalls(message, answer) {
    const calls = message.toolCalls ?? [];
    if (!calls.length || this.hasForm) return;
    this.calls ??= this.content.appendChild(element("div", { class: "calls" }));
    const isWaiting = !answer && message.finish === "tool_calls" && this.actions.needsResults(message);
    this.hasForm = isWaiting && calls.some((call) => !call.broken); // which keeps what the user has entered
    if (this.hasForm) this.calls.replaceChildren(resultsForm(calls, (results) => this.actions.sendResults(message, results)));
    else this.calls.replaceChildren(...calls.map(callNode));
  }

  showProgress(answer) {
    this.progress?.remove();
    this.progress = null;
    if (!answer) return;
    const { progress, notice, busySeconds } = answer;
    if (busySeconds) this.progress = element("p", { class: "notice" }, text("busyRetry", { seconds: busySeconds }));
    else if (notice) {
      this.progress = element("p", { class: "notice", role: "status" }, noticeText(notice));
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
    const go = (offset, sign, label) =>
      element(
        "button",
        {
          type: "button",
          class: "small",
          "aria-label": label,
          disabled: index + offset < 0 || index + offset >= this.versions.length,
          onclick: () => this.actions.select(this.versions[index + offset]),
        },
        sign,
      );
    const position = text("versionOf", { number: index + 1, count: this.versions.length });
    const previous = go(-1, "‹", text("previousVersion"));
    return element("span", { class: "versions" }, previous, ` ${position} `, go(1, "›", text("nextVersion")));
  }
}

const button = (label, onclick) => element("button", { type: "button", class: "small", onclick }, label);

const ATTACHED = /^.*:\n(`{3,})\n([^]*)\n\1$/; // a file as attachments.js writes it: its name, then its text as code

// Return a file of a message, folded.
function fileNode(part) {
  const lines = part.text.match(ATTACHED)?.[2] ?? part.text;
  const summary = element("summary", {}, `${part.name} · ${bytes(new Blob([lines]).size)}`);
  return element("details", { class: "file" }, summary, element("pre", { class: "result", tabindex: "0" }, lines));
}

function noticeText({ type, reason }) {
  if (type === "resumed") return text("ringBack");
  if (type === "serverLost") return text("answerWaits");
  if (type === "serverBack") return text("answerContinues");
  if (type === "startedAgain") return text("answerStartsAgain");
  return text("ringNotice", { reason: reason ?? "" });
}

// Return the heading of the reasoning: how long the model thought, which an imported answer may not say.
function thoughtOf(seconds) {
  if (seconds === undefined) return text("thoughts");
  return seconds < 1 ? text("thoughtBriefly") : text("thought", { time: duration(seconds) });
}

function remarkOf(message) {
  if (message.role !== "assistant") return "";
  if (message.finish === "error") {
    const isEmpty = !message.content && !message.reasoning;
    return message.error?.status === 0 && isEmpty ? text("unreachable") : errorText(message.error ?? { status: 0 });
  }
  if (message.finish === "stopped") return text("stoppedByUser");
  if (message.finish === "length") return text("lengthLimit");
  if (message.finish === null) return text("cutOff");
  return message.content || message.toolCalls?.length ? "" : text("emptyAnswer");
}

const shortTime = (ms) => (ms < 1000 ? text("milliseconds", { milliseconds: Math.round(ms) }) : duration(ms / 1000));

function statisticsOf({ usage, timings }) {
  const rate = timings?.predicted_per_second;
  return text("statistics", {
    tokens: count(usage.completion_tokens ?? 0),
    rate: rate ? decimal(rate) : "–",
    prompt: count(usage.prompt_tokens ?? 0),
    cached: count(usage.prompt_tokens_details?.cached_tokens ?? 0),
    first: timings?.prompt_ms === undefined ? "–" : shortTime(timings.prompt_ms),
  });
}
