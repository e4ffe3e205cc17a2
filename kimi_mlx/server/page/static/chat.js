// The conversation that is shown: its branch of messages, new messages, and the answer in progress.

import { Answer, requestBody } from "./answer.js";
import { byId, element } from "./dom.js";
import { count, decimal, text } from "./i18n.js";
import { MessageView } from "./message_view.js";
import * as store from "./store.js";

const AT_END_PIXELS = 60;
const MAX_TITLE = 60;

export class Chat {
  // `model` has name, context; `onChanged` is called when the list of conversations may have changed, `onServerError` with errors.
  constructor(model, { onChanged, onServerError }) {
    Object.assign(this, { model, onChanged, onServerError });
    this.log = byId("log");
    this.answers = new Map(); // by conversation, in progress
    this.views = new Map();
    this.conversation = null;
  }

  // Show a conversation, or an empty one.
  async open(id) {
    const conversation = id ? await store.conversation(id) : undefined;
    this.conversation = conversation ?? {
      id: store.newId(),
      title: "",
      model: this.model.name,
      settings: {},
      leaf: null,
      created: Date.now(),
      updated: Date.now(),
    };
    this.isNew = !conversation;
    const running = this.answers.get(this.conversation.id);
    this.messages = new Map((await store.messages(this.conversation.id)).map((message) => [message.id, message]));
    if (running) this.messages.set(running.message.id, running.message);
    await this.draw();
    return !id || Boolean(conversation);
  }

  get answer() {
    return this.answers.get(this.conversation.id) ?? null;
  }

  get path() {
    return store.branch(this.messages, this.conversation.leaf);
  }

  // Show the branch. Messages that are shown already keep their nodes, so that a long conversation is not rendered again.
  async draw() {
    const shown = this.views;
    this.views = new Map();
    const nodes = [];
    const isDrawing = [];
    for (const message of this.path) {
      const versions = store.siblings(this.messages, message);
      const isRunning = this.answer?.message === message;
      let view = shown.get(message.id);
      if (isRunning || !view?.isStill(message, versions)) {
        view = new MessageView(message, versions, this.actions(), this.model.name);
        if (isRunning) view.update(this.answer);
        else if (message.role === "assistant") isDrawing.push(view.finish());
      }
      this.views.set(message.id, view);
      nodes.push(view.node);
    }
    if (!nodes.length) nodes.push(this.emptyNode());
    this.log.replaceChildren(...nodes);
    this.scrollToEnd();
    this.showState();
    await Promise.all(isDrawing);
    this.scrollToEnd();
  }

  emptyNode() {
    const hint = store.isPersistent ? "emptyHint" : "privateStorage";
    return element(
      "div",
      { class: "empty" },
      element("p", { class: "large" }, text("empty", { model: this.model.name })),
      element("p", {}, text(hint)),
    );
  }

  actions() {
    return {
      redraw: () => this.draw(),
      edit: (message, content) => this.send(content, message.parent),
      retry: (message) => this.generate(message.parent),
      continueAnswer: (message) => this.continueAnswer(message),
      select: async (message) => {
        this.conversation.leaf = store.newestLeaf(this.messages, message);
        await this.save();
        await this.draw();
      },
      needsResults: (message) => message.id === this.conversation.leaf,
      sendResults: (message, results) => this.sendResults(message, results),
    };
  }

  // Send a message of the user; resolves once the answer has begun or could not begin.
  async send(content, parent = this.conversation.leaf) {
    if (this.answer) return;
    const message = await this.addMessage("user", content, parent);
    if (!this.conversation.title) {
      this.conversation.title = store.textOf(content).trim().split("\n")[0].slice(0, MAX_TITLE) || text("untitled");
    }
    await this.generate(message.id);
  }

  async sendResults(message, results) {
    let parent = message.id;
    for (const [index, call] of message.toolCalls.entries()) {
      const result = await this.addMessage("tool", results[index], parent, { toolCallId: call.id });
      parent = result.id;
    }
    await this.generate(parent);
  }

  async addMessage(role, content, parent, fields = {}) {
    const message = { id: store.newId(), conversation: this.conversation.id, parent, role, content, created: Date.now(), ...fields };
    this.messages.set(message.id, message);
    this.conversation.leaf = message.id;
    await this.persist(() => store.saveMessage(message));
    return message;
  }

  // Answer the branch that ends in a message.
  async generate(parent) {
    if (this.answer) return;
    const message = await this.addMessage("assistant", "", parent);
    await this.save();
    const path = store.branch(this.messages, parent);
    await this.run(message, requestBody(path, this.conversation.settings));
  }

  // Let the model go on with an answer that was cut.
  async continueAnswer(message) {
    if (this.answer) return;
    const path = store.branch(this.messages, message.parent);
    const body = requestBody(path, this.conversation.settings, message.content);
    delete message.error;
    await this.run(message, body);
  }

  async run(message, body) {
    const { conversation } = this;
    let isDrawn = true;
    const answer = new Answer(message, () => {
      if (!isDrawn) return;
      isDrawn = false; // at most once a frame
      requestAnimationFrame(() => {
        isDrawn = true;
        this.showAnswer(answer);
      });
    });
    this.answers.set(conversation.id, answer);
    this.announce(text("answering"));
    this.draw();
    try {
      await answer.run(body);
    } catch (error) {
      this.onServerError({ status: -1, message: error.message });
    }
    this.answers.delete(conversation.id);
    if (message.error) this.onServerError(message.error);
    conversation.updated = Date.now();
    conversation.model = this.model.name;
    await this.persist(() => store.saveConversation(conversation));
    this.onChanged();
    if (conversation !== this.conversation) return;
    const isAtEnd = this.isAtEnd();
    await this.views.get(message.id)?.finish();
    if (isAtEnd) this.scrollToEnd();
    this.showState();
    const done = text("answerDone", { tokens: count(message.usage?.completion_tokens ?? 0) });
    this.announce(message.finish === "stopped" ? text("answerStopped") : done);
  }

  showAnswer(answer) {
    if (this.answer !== answer) return;
    const isAtEnd = this.isAtEnd();
    this.views.get(answer.message.id)?.update(answer);
    if (isAtEnd) this.scrollToEnd();
    this.showUsage();
  }

  stop() {
    this.answer?.stop();
  }

  async save() {
    this.conversation.updated = Date.now();
    await this.persist(() => store.saveConversation(this.conversation));
    this.isNew = false;
    this.onChanged();
  }

  async persist(write) {
    try {
      await write();
    } catch (error) {
      this.onServerError({ status: -1, message: text("storageFull", { message: error.message }) });
    }
  }

  showState() {
    byId("send").hidden = this.answer !== null;
    byId("stop").hidden = this.answer === null;
    const title = byId("title");
    if (document.activeElement !== title) title.value = this.conversation.title;
    title.placeholder = text("untitled");
    byId("export").disabled = this.path.length === 0;
    document.title = `${this.conversation.title || text("untitled")} · ${this.model.name}`;
    this.showUsage();
  }

  // Show the part of the context that the branch uses, or the speed of the answer in progress.
  showUsage() {
    const last = this.path.findLast((message) => message.usage);
    const parts = [];
    const rate = this.answer?.rate;
    if (rate) parts.push(`≈ ${decimal(rate)} tok/s`);
    if (last && this.model.context) {
      parts.push(text("contextUsed", { used: count(last.usage.total_tokens), total: count(this.model.context) }));
    }
    byId("usage").textContent = parts.join(" · ");
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < AT_END_PIXELS;
  }

  scrollToEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  announce(message) {
    byId("announcer").textContent = message;
  }
}
