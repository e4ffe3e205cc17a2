// The conversation that is shown: its branch of messages, new messages, and the answers in progress.

import { Answer } from "./answer.js";
import { byId, element } from "./dom.js";
import { count, decimal, text } from "./i18n.js";
import { focusInput } from "./keyboard.js";
import { LogScroll } from "./log_scroll.js";
import { MessageView } from "./message_view.js";
import { branch, newestLeaf, siblings, textOf } from "./messages.js";
import { requestBody } from "./request_body.js";
import * as store from "./store.js";

const MAX_TITLE = 60;
const OTHER_TAB_MS = 5000; // without a new part of an answer, after which its tab counts as closed

export class Chat {
  // `model` has name, context; `onChanged` is called when the list of conversations may have changed, `onServerError` with
  // errors; `askKey` resolves with whether the server accepts the new key.
  constructor(model, { onChanged, onServerError, askKey }) {
    Object.assign(this, { model, onChanged, onServerError, askKey });
    this.log = byId("log");
    this.answers = new Map(); // answers in progress, by id of their conversation
    this.elsewhere = new Map(); // timers of answers in progress in other tabs, by id of the message
    this.views = new Map();
    this.conversation = null;
    this.scroll = new LogScroll(this.log);
  }

  // Show a conversation, or an empty one; resolves with whether it exists, or null if another was opened meanwhile.
  async open(id) {
    const number = (this.openings = (this.openings ?? 0) + 1);
    const conversation = id ? await store.conversation(id) : undefined;
    const messages = conversation ? await store.messages(id) : [];
    if (number !== this.openings) return null;
    this.conversation = conversation ?? {
      id: store.newId(),
      title: "",
      model: this.model.name,
      settings: {},
      leaf: null,
      created: Date.now(),
      updated: Date.now(),
    };
    this.messages = new Map(messages.map((message) => [message.id, message]));
    if (this.answer) {
      this.conversation = this.answer.conversation; // its record, which is newer
      this.messages.set(this.answer.message.id, this.answer.message);
    }
    await this.draw();
    return !id || Boolean(conversation);
  }

  // Read the conversation again, because another tab has changed it.
  async reload(id) {
    const isEditing = this.log.contains(document.activeElement) && document.activeElement.matches("textarea");
    if (id !== this.conversation.id) return;
    this.isStale = this.answer !== null || isEditing; // then it is read afterwards
    if (this.isStale) return;
    const conversation = await store.conversation(id);
    const messages = await store.messages(id);
    if (!conversation || id !== this.conversation.id || this.answer) return;
    this.conversation = conversation;
    this.messages = new Map(messages.map((message) => [message.id, message]));
    await this.draw(true);
  }

  // Show the name of the model, also above the answer in progress: it is known late if the server needs a key.
  showName() {
    for (const view of this.views.values()) view.showName(this.model.name);
    const heading = this.log.querySelector(".empty .large");
    if (heading) heading.textContent = text("empty", { model: this.model.name });
    this.showState();
  }

  // Show a part of an answer that streams in another tab.
  showElsewhere(message) {
    if (message.conversation !== this.conversation.id || this.answers.has(message.conversation)) return;
    const timer = this.elsewhere.get(message.id);
    clearTimeout(timer);
    const onSilence = () => {
      this.elsewhere.delete(message.id);
      this.reload(message.conversation);
    };
    this.elsewhere.set(message.id, setTimeout(onSilence, OTHER_TAB_MS));
    this.messages.set(message.id, message);
    const view = this.views.get(message.id);
    const hasLess = message.content.length < (view?.message.content.length ?? 0); // it starts again
    if (!timer || !view || hasLess) this.draw(true);
    else {
      view.message = message;
      view.update({ message, isElsewhere: true });
      this.scroll.follow();
    }
  }

  stopAnswer(id) {
    this.answers.get(id)?.stop();
  }

  async rename(id, title) {
    const isOpen = id === this.conversation.id;
    const conversation = isOpen ? this.conversation : (this.answers.get(id)?.conversation ?? (await store.conversation(id)));
    if (!conversation) return;
    conversation.title = title;
    if (!isOpen || this.path.length) await this.persist(() => store.updateConversation(conversation, ["title"]));
    if (isOpen) this.showState();
    this.onChanged();
  }

  get answer() {
    return this.conversation ? (this.answers.get(this.conversation.id) ?? null) : null;
  }

  get path() {
    return branch(this.messages, this.conversation.leaf);
  }

  // Show the branch; with `keepsPlace` where the user has scrolled to. Messages that are shown already keep their nodes, so
  // that a long conversation is not rendered again.
  async draw(keepsPlace = false) {
    const shown = this.views;
    this.views = new Map();
    const nodes = [];
    const drawings = [];
    for (const message of this.path.reverse()) { // the newest first: they are seen
      const versions = siblings(this.messages, message);
      const answer = this.answerOf(message);
      let view = shown.get(message.id);
      if (answer || !view?.isCurrent(message, versions)) {
        view = new MessageView(message, versions, this.actions(), this.model.name);
        if (answer) view.update(answer);
        else if (message.role === "assistant") drawings.push(view.finish());
      }
      this.views.set(message.id, view);
      nodes.unshift(view.node);
    }
    if (!nodes.length) nodes.push(this.emptyNode());
    this.scroll.show(nodes, keepsPlace);
    this.showState();
    Promise.all(drawings).then(() => this.scroll.follow()); // a long conversation takes a while
  }

  // Show everything again, such as after the server was away or has another model.
  async drawAll() {
    this.views.clear();
    await this.draw(true);
  }

  // Return the answer in progress of a message, in this tab or another; null if there is none.
  answerOf(message) {
    if (this.answer?.message === message) return this.answer;
    return this.elsewhere.has(message.id) && message.finish === null ? { message, isElsewhere: true } : null;
  }

  emptyNode() {
    return element(
      "div",
      { class: "empty" },
      element("p", { class: "large" }, text("empty", { model: this.model.name })),
      element("p", {}, store.isPersistent ? text("emptyHint") : text("privateStorage")),
    );
  }

  actions() {
    return {
      redraw: () => (this.isStale ? this.reload(this.conversation.id) : this.draw(true)),
      beginEdit: () => this.scroll.stopFollowing(), // the form stays where it is, although it changes the height
      edit: (message, content) => this.askByButton(() => this.send(content, message.parent)),
      retry: (message) => this.askByButton(() => this.generate(message.parent)),
      continueAnswer: (message) => this.askByButton(() => this.continueAnswer(message)),
      select: async (message) => {
        this.conversation.leaf = newestLeaf(this.messages, message);
        await this.save(["leaf"]);
        await this.draw(true);
      },
      needsResults: (message) => message.id === this.conversation.leaf,
      sendResults: (message, results) => this.askByButton(() => this.sendResults(message, results)),
    };
  }

  // Request an answer after a click in the conversation. The button is drawn again, so the focus moves to the message box.
  askByButton(request) {
    const ended = request();
    focusInput();
    return ended;
  }

  // Send a message of the user; resolves once the answer is complete.
  async send(content, parent = this.conversation.leaf) {
    await this.stopAndWait();
    const message = this.addMessage("user", content, parent);
    this.conversation.title ||= titleOf(content);
    await this.generate(message.id);
  }

  async sendResults(message, results) {
    let parent = message.id;
    for (const [index, call] of message.toolCalls.filter((item) => !item.broken).entries()) {
      parent = this.addMessage("tool", results[index], parent, { toolCallId: call.id, name: call.name }).id;
    }
    await this.generate(parent);
  }

  addMessage(role, content, parent, fields = {}) {
    const newest = [...this.messages.values()].reduce((latest, item) => Math.max(latest, item.created), 0);
    const created = Math.max(Date.now(), newest + 1); // the clock may have been set back
    const message = { id: store.newId(), conversation: this.conversation.id, parent, role, content, created, ...fields };
    this.messages.set(message.id, message);
    this.conversation.leaf = message.id;
    this.persist(() => store.saveMessage(message));
    return message;
  }

  // Answer the branch that ends in a message.
  async generate(parent) {
    await this.stopAndWait();
    const { settings } = this.conversation;
    const message = this.addMessage("assistant", "", parent, settings.schema ? { isJson: true } : {});
    await this.startAnswer(message);
  }

  // Let the model continue an unfinished answer.
  async continueAnswer(message) {
    await this.stopAndWait();
    await this.startAnswer(message);
  }

  // Request an answer, or the rest of one; the user may show other conversations meanwhile.
  async startAnswer(message) {
    const { conversation } = this;
    const { settings } = conversation;
    const path = branch(this.messages, message.parent);
    let isDrawn = true;
    const onUpdate = () => {
      if (!isDrawn) return;
      isDrawn = false; // at most once a frame
      requestAnimationFrame(() => {
        isDrawn = true;
        this.showAnswer(answer);
      });
    };
    const onSaveError = (error) => this.onSaveError(error);
    const answer = new Answer(message, this.model.id, { onUpdate, onSaveError });
    answer.conversation = conversation;
    this.answers.set(conversation.id, answer);
    this.announce(text("answering"));
    answer.ended = this.receive(answer, () => requestBody(path, settings, message));
    this.draw();
    this.save(["leaf", "title"]);
    await answer.ended;
  }

  // Receive an answer until its end.
  async receive(answer, newBody) {
    const { conversation, message } = answer;
    do await answer.run(newBody);
    while (message.error?.status === 401 && (await this.askKey()));
    this.answers.delete(conversation.id);
    const isShown = conversation === this.conversation; // then the error stands below the answer
    if (message.error && (message.error.status === 0 || (!isShown && message.error.status !== 401))) this.onServerError(message.error);
    conversation.updated = Date.now();
    conversation.model = this.model.name;
    await this.persist(() => store.updateConversation(conversation, ["updated", "model"]));
    this.onChanged();
    if (conversation !== this.conversation) return;
    await this.views.get(message.id)?.finish();
    this.scroll.follow();
    this.showState();
    const done = text("answerDone", { tokens: count(message.usage?.completion_tokens ?? 0) });
    if (this.isStale) this.reload(conversation.id);
    const error = this.log.querySelector(`[data-id="${message.id}"] .footer .error`)?.textContent ?? "";
    this.announce({ stopped: text("answerStopped"), error }[message.finish] ?? done);
  }

  showAnswer(answer) {
    if (this.answer !== answer) return;
    if (answer.isReset) {
      answer.isReset = false;
      this.draw(true);
    } else this.views.get(answer.message.id)?.update(answer);
    this.scroll.follow();
    this.showUsage();
  }

  stop() {
    this.answer?.stop();
  }

  async stopAndWait() {
    const { answer } = this;
    answer?.stop();
    await answer?.ended;
  }

  async save(names) {
    this.conversation.updated = Date.now();
    await this.persist(() => store.updateConversation(this.conversation, [...names, "updated"]));
    this.onChanged();
  }

  async persist(write) {
    try {
      await write();
    } catch (error) {
      this.onSaveError(error);
    }
  }

  onSaveError(error) {
    this.onServerError({ status: -1, message: text("storageFull", { message: error.message }) });
  }

  showState() {
    byId("send").hidden = this.answer !== null;
    byId("stop").hidden = this.answer === null;
    const title = byId("title");
    if (document.activeElement !== title) title.value = this.conversation.title;
    title.placeholder = text("untitled");
    const isChanged = Object.keys(this.conversation.settings).length > 0;
    byId("settings").classList.toggle("changed", isChanged);
    byId("settings").title = isChanged ? text("settingsChanged") : "";
    byId("export").disabled = this.path.length === 0;
    document.title = `${this.conversation.title || text("untitled")} · ${this.model.name}`;
    this.showUsage();
  }

  // Show the part of the context that the branch uses, and the speed of the answer in progress.
  showUsage() {
    const last = this.path.findLast((message) => message.usage?.total_tokens);
    const parts = [];
    const rate = this.answer?.rate;
    if (rate) parts.push(`≈ ${decimal(rate)} tok/s`);
    if (last && this.model.context) {
      parts.push(text("contextUsed", { used: count(last.usage.total_tokens), total: count(this.model.context) }));
    }
    byId("usage").textContent = parts.join(" · ");
  }

  announce(message) {
    byId("announcer").textContent = message;
  }
}

// Return a title for a conversation that begins with a message.
function titleOf(content) {
  const written = textOf(content, { withFiles: false }).trim() || (typeof content === "string" ? "" : content[0]?.name);
  return (written ?? "").split("\n")[0].slice(0, MAX_TITLE) || text("untitled");
}
