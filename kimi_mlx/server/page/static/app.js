// The page: its views, which the address names (#/ID of a conversation, #/cluster), and what connects them.

import { Chat } from "./chat.js";
import { ClusterView } from "./cluster.js";
import { Composer } from "./composer.js";
import { connect, model, noteAnswer, showServerError } from "./connection.js";
import { download, toJson, toMarkdown } from "./conversation_files.js";
import { ask, cancelButton, isDialogOpen } from "./dialog.js";
import { byId, element } from "./dom.js";
import { showBanner, showStatus } from "./header.js";
import { text, translate } from "./i18n.js";
import { focusInput } from "./keyboard.js";
import { editSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { StatusFeed } from "./status_feed.js";
import * as store from "./store.js";

translate();

const chat = new Chat(model, {
  onChanged: () => sidebar.refresh(chat.conversation.id),
  onServerError: showServerError,
  askKey: async () => {
    const isRight = await connect();
    if (isRight) {
      feed.start();
      await showModel();
    }
    return isRight;
  },
});

const cluster = new ClusterView();

const sidebar = new Sidebar({
  onOpen: (id) => goTo(id),
  onDelete: (id) => chat.stopAnswer(id),
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
    firstView.then(() => {
      chat.send(content);
      history.replaceState(null, "", `#/${chat.conversation.id}`);
    });
  },
  onStop: () => chat.stop(),
  onError: showBanner,
});

const feed = new StatusFeed({
  onStatus: async (status) => {
    showStatus(status);
    cluster.update(status);
    const isBack = noteAnswer();
    if ((isBack || status.model !== model.id) && (await connect())) await showModel();
  },
  onError: (error) => {
    if (error.status !== 0) return;
    showServerError(error);
    cluster.showGone();
  },
  askKey: connect,
});

// Show what depends on the model, which is known once the page is connected.
async function showModel() {
  composer.seesImages = model.seesImages;
  await firstView;
  const isEditing = [...byId("log").querySelectorAll("textarea")].some((area) => area.value);
  if (chat.answer || isEditing) chat.showName();
  else await chat.drawAll();
}

// Show a conversation, or a new one for null.
function goTo(id) {
  const hash = id ? `#/${id}` : "#/";
  if (location.hash === hash) showView();
  else location.hash = hash;
}

// Show the view that the address names.
async function showView() {
  const id = location.hash.replace(/^#\/?/, "");
  const isCluster = id === "cluster";
  byId("chat-view").hidden = isCluster;
  setCurrent(byId("to-chat"), !isCluster);
  setCurrent(byId("to-cluster"), isCluster);
  showSidebar(false);
  cluster.show(isCluster);
  if (isCluster) {
    document.title = `${text("cluster")} · ${model.name}`;
    if (!chat.conversation && (await chat.open(null)) === null) return;
    byId("to-chat").href = chat.path.length ? `#/${chat.conversation.id}` : "#/";
    await sidebar.refresh(null);
    return;
  }
  if (id && id === chat.conversation?.id) await chat.draw(true);
  else {
    const exists = await chat.open(id || null);
    if (exists === null) return;
    if (!exists) history.replaceState(null, "", "#/");
  }
  await sidebar.refresh(chat.conversation.id);
  focusInput();
}

function setCurrent(link, isCurrent) {
  if (isCurrent) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

// Show or hide the list of conversations on a narrow screen.
function showSidebar(isShown) {
  if (isSidebarShown() === isShown) return;
  document.body.classList.toggle("with-sidebar", isShown);
  byId("menu").setAttribute("aria-expanded", String(isShown));
  byId(isShown ? "new" : "menu").focus();
}

const isSidebarShown = () => document.body.classList.contains("with-sidebar");

async function changeSettings() {
  const { conversation } = chat;
  const settings = await editSettings(conversation.settings, model.sampling);
  if (settings === null) return;
  conversation.settings = settings;
  if (chat.path.length) await chat.save(["settings"]);
  chat.showState();
}

async function exportConversation() {
  const buttons = [
    cancelButton(),
    { label: text("exportMarkdown"), value: "md" },
    { label: text("exportJson"), value: "json", kind: "primary" },
  ];
  const format = await ask(text("exportTitle"), [element("p", { class: "hint" }, text("exportHint"))], buttons);
  const name = (chat.conversation.title || text("untitled")).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  if (format === "md") download(`${name}.md`, "text/markdown", toMarkdown(chat.conversation, chat.path));
  if (format === "json") download(`${name}.json`, "application/json", await toJson([chat.conversation]));
}

// Show what another tab has changed.
function onChangeElsewhere({ id, message, isDeleted }) {
  if (!chat.conversation) return; // nothing is shown yet
  if (message) {
    chat.showElsewhere(message);
    return;
  }
  if (isDeleted) chat.stopAnswer(id);
  if (isDeleted && id === chat.conversation.id) {
    showBanner(text("deletedElsewhere"));
    goTo(null);
  } else chat.reload(id);
  sidebar.refresh();
}

async function start() {
  if (await connect()) await showModel();
  if (byId("enter-key").hidden) feed.start(); // also without a connection: it notices when the server is back
}

byId("title").addEventListener("change", () => chat.rename(chat.conversation.id, byId("title").value.trim()));
byId("settings").addEventListener("click", changeSettings);
byId("export").addEventListener("click", exportConversation);
byId("enter-key").addEventListener("click", start);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  byId(byId("chat-view").hidden ? "cluster-view" : "input").focus();
});
document.addEventListener("click", (event) => {
  if (byId("menu").contains(event.target)) showSidebar(!isSidebarShown());
  else if (!event.target.isConnected) return;
  else if (event.target.closest("#conversations a") || !event.target.closest("#sidebar, dialog")) showSidebar(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || isDialogOpen()) return;
  if (isSidebarShown()) showSidebar(false);
  else chat.stop();
});
addEventListener("hashchange", showView);
addEventListener("pagehide", () => {
  for (const answer of chat.answers.values()) answer.save();
});
store.onChange(onChangeElsewhere);

const firstView = store.open().then(showView);
start();
