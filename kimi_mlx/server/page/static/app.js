// The page: connects the views, the address (#/ID, #/cluster), the keyboard, and the state of the server.

import { getJson, key } from "./api.js";
import { Chat } from "./chat.js";
import { ClusterView } from "./cluster.js";
import { Composer } from "./composer.js";
import { download, toJson, toMarkdown } from "./conversation_files.js";
import { ask, askKey, cancelButton, isDialogOpen } from "./dialog.js";
import { byId, element } from "./dom.js";
import { text, translate } from "./i18n.js";
import { focusInput } from "./keyboard.js";
import { errorText } from "./message_view.js";
import { editSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { StatusFeed } from "./status_feed.js";
import * as store from "./store.js";

const BANNER_MS = 8000;

const model = { name: "Kimi", context: 0, seesImages: false, sampling: {} };

// Show a message below the header; it disappears after a while unless `isLasting`.
let bannerTimer = null;
function showBanner(message, isLasting = false) {
  const banner = byId("banner");
  clearTimeout(bannerTimer);
  banner.textContent = message;
  banner.hidden = !message;
  banner.classList.toggle("passing", !isLasting);
  if (message && !isLasting) bannerTimer = setTimeout(() => showBanner(""), BANNER_MS);
}

// Show the state of the server in the header: a kind for its colour, and words.
function showState(kind, words, title = "") {
  const state = byId("state");
  if (state.textContent !== words) state.textContent = words;
  state.dataset.kind = kind;
  state.title = title;
  byId("enter-key").hidden = kind !== "key";
}

function showStatus(status) {
  if (!status.is_up) {
    showState("bad", status.backend === "ring" ? text("stateRestarting") : text("stateDown"), status.reason ?? "");
    return;
  }
  const parts = [];
  if (status.active) parts.push(text("stateBusy", { active: status.active }));
  if (status.waiting) parts.push(text("stateQueue", { waiting: status.waiting }));
  showState(parts.length ? "busy" : "good", parts.join(" · ") || text("stateReady"));
}

// Read the model from the server, with a key if it needs one; resolves with whether that worked.
let connecting = null;
function connect() {
  connecting ??= readModel().finally(() => {
    connecting = null;
  });
  return connecting;
}

async function readModel() {
  let hasAsked = false;
  for (;;) {
    try {
      const { data } = await getJson("v1/models");
      const [first] = data;
      Object.assign(model, {
        name: first.display_name ?? first.id,
        id: first.id,
        context: first.context_length ?? 0,
        seesImages: Boolean(first.supports_image_in),
      });
      const { sampling } = await getJson("v1/cluster");
      model.sampling = sampling;
      byId("model").textContent = model.name;
      if (hasAsked) {
        showBanner("");
        showState("", "");
      }
      return true;
    } catch (error) {
      if (error.status !== 401) {
        onServerError(error);
        return false;
      }
      showState("key", "");
      hasAsked = true;
      const value = await askKey(Boolean(key.get()));
      if (value === null) {
        showBanner(text("keyNeeded"), true);
        return false;
      }
      key.set(value);
    }
  }
}

let isGone = false;
function onServerError(error) {
  if (error.status === 0) {
    isGone = true;
    showState("bad", text("stateGone"));
    showBanner(text("serverGone"), true);
  } else showBanner(error.status === -1 ? error.message : errorText(error));
}

function main() {
  translate();
  const chat = new Chat(model, {
    onChanged: () => sidebar.refresh(chat.conversation.id),
    onServerError,
    askKey: async () => {
      const isRight = await connect();
      if (isRight) feed.start();
      return isRight;
    },
  });
  const cluster = new ClusterView();
  const sidebar = new Sidebar({
    onOpen: (id) => goTo(id),
    onDelete: (id) => chat.forget(id),
    onDeleted: (id) => (id === chat.conversation.id ? goTo(null) : sidebar.refresh()),
    onRename: (id, title) => chat.rename(id, title),
    onImported: (ids) => {
      showBanner(text("imported", { count: ids.length }));
      if (ids.length === 1) goTo(ids[0]);
    },
    onMessage: showBanner,
    isAnswering: (id) => chat.answers.has(id),
  });
  const composer = new Composer({
    onSend: (content) => {
      chat.send(content);
      history.replaceState(null, "", `#/${chat.conversation.id}`);
    },
    onStop: () => chat.stop(),
    onError: showBanner,
  });
  const feed = new StatusFeed({
    onStatus: async (status) => {
      showStatus(status);
      cluster.update(status);
      const isBack = isGone;
      isGone = false;
      if (isBack) showBanner(text("serverBack"));
      if ((isBack || status.model !== model.id) && (await connect())) await showModel();
    },
    onError: (error) => {
      if (error.status !== 0) return;
      onServerError(error);
      cluster.showGone();
    },
    askKey: connect,
  });

  async function showModel() {
    composer.seesImages = model.seesImages;
    await isOpen;
    if (chat.answer || isEditing()) chat.showName();
    else await chat.drawAll();
  }

  const isEditing = () => byId("log").querySelector("form.edit") !== null;

  function goTo(id) {
    const hash = id ? `#/${id}` : "#/";
    if (location.hash === hash) route();
    else location.hash = hash;
  }

  async function route() {
    const id = location.hash.replace(/^#\/?/, "");
    const isCluster = id === "cluster";
    byId("chat-view").hidden = isCluster;
    setCurrent(byId("to-chat"), !isCluster);
    setCurrent(byId("to-cluster"), isCluster);
    showSidebar(false);
    cluster.show(isCluster);
    if (isCluster) {
      document.title = `${text("cluster")} · ${model.name}`;
      if (!chat.conversation) await chat.open(null);
      byId("to-chat").href = chat.path.length ? `#/${chat.conversation.id}` : "#/";
      await sidebar.refresh(null);
      return;
    }
    if (id && id === chat.conversation?.id) await chat.draw(true);
    else if (!(await chat.open(id || null))) history.replaceState(null, "", "#/");
    await sidebar.refresh(chat.conversation.id);
    focusInput();
  }

  function showSidebar(isShown) {
    if (document.body.classList.contains("with-sidebar") === isShown) return;
    document.body.classList.toggle("with-sidebar", isShown);
    byId("menu").setAttribute("aria-expanded", String(isShown));
    byId(isShown ? "new" : "menu").focus();
  }

  document.addEventListener("click", (event) => {
    if (byId("menu").contains(event.target)) showSidebar(!document.body.classList.contains("with-sidebar"));
    else if (!event.target.closest("#sidebar, dialog") && event.target.isConnected) showSidebar(false);
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address is that of the conversation
    if (byId("chat-view").hidden) byId("cluster-view").focus();
    else byId("input").focus();
  });
  byId("title").addEventListener("change", () => chat.rename(chat.conversation.id, byId("title").value.trim()));
  byId("settings").addEventListener("click", async () => {
    const { conversation } = chat;
    const settings = await editSettings(conversation.settings, model.sampling);
    if (settings === null) return;
    conversation.settings = settings;
    if (chat.path.length) await chat.save();
    chat.showState();
  });
  byId("export").addEventListener("click", async () => {
    const buttons = [
      cancelButton(),
      { label: text("exportMarkdown"), value: "md" },
      { label: text("exportJson"), value: "json", kind: "primary" },
    ];
    const form = await ask(text("exportTitle"), [element("p", { class: "hint" }, text("exportHint"))], buttons);
    const name = (chat.conversation.title || text("untitled")).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
    if (form === "md") download(`${name}.md`, "text/markdown", toMarkdown(chat.conversation, chat.path));
    if (form === "json") download(`${name}.json`, "application/json", await toJson([chat.conversation]));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || isDialogOpen()) return;
    if (document.body.classList.contains("with-sidebar")) showSidebar(false);
    else chat.stop();
  });
  store.onChange(({ id, message, isDeleted }) => {
    if (!chat.conversation) return; // nothing is shown yet
    if (message) {
      chat.showElsewhere(message);
      return;
    }
    if (isDeleted) chat.forget(id);
    if (isDeleted && id === chat.conversation.id) {
      showBanner(text("deletedElsewhere"));
      goTo(null);
    } else chat.reload(id);
    sidebar.refresh();
  });
  addEventListener("hashchange", route);
  addEventListener("pagehide", () => {
    for (const answer of chat.answers.values()) answer.save();
  });

  const isOpen = store.open().then(route);
  const start = async () => {
    if (await connect()) await showModel();
    if (byId("enter-key").hidden) feed.start(); // it finds out when the server is back
  };
  byId("enter-key").addEventListener("click", start);
  start();
}

function setCurrent(link, isCurrent) {
  if (isCurrent) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

main();
