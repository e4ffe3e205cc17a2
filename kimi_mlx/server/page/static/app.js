// The page: connects the views, the address (#/ID, #/cluster), the keyboard, and the state of the server.

import { getJson, key } from "./api.js";
import { Chat } from "./chat.js";
import { ClusterView } from "./cluster.js";
import { Composer } from "./composer.js";
import { ask, askKey, cancelButton } from "./dialog.js";
import { byId, download } from "./dom.js";
import * as exchange from "./exchange.js";
import { text, translate } from "./i18n.js";
import { errorText } from "./message_view.js";
import { editSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";

const POLL_MS = 3000;
const BANNER_MS = 8000;

const model = { name: "Kimi", context: 0, seesImages: false, sampling: {} };

// Show a message below the header; one that is not `lasting` goes away by itself.
let bannerTimer = null;
function showBanner(message, isLasting = false) {
  const banner = byId("banner");
  clearTimeout(bannerTimer);
  banner.textContent = message;
  banner.hidden = !message;
  if (message && !isLasting) bannerTimer = setTimeout(() => showBanner(""), BANNER_MS);
}

// Read the model from the server, with a key if it needs one; returns whether that worked.
async function connect() {
  for (;;) {
    try {
      const { data } = await getJson("v1/models");
      const [first] = data;
      Object.assign(model, {
        name: first.display_name ?? first.id,
        context: first.context_length ?? 0,
        seesImages: Boolean(first.supports_image_in),
      });
      byId("model").textContent = model.name;
      return true;
    } catch (error) {
      if (error.status !== 401) {
        onServerError(error);
        return false;
      }
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
  if (error.status === 0) waitForServer();
  else if (error.status === 401) connect();
  else showBanner(error.status === -1 ? error.message : errorText(error));
}

// Wait until the server answers again.
async function waitForServer() {
  if (isGone) return;
  isGone = true;
  showBanner(text("serverGone"), true);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (document.visibilityState !== "visible") continue;
    try {
      await fetch("health", { cache: "no-store" }); // any answer will do
      break;
    } catch {
      // still gone
    }
  }
  isGone = false;
  if (await connect()) showBanner(text("serverBack"));
}

function main() {
  translate();
  const chat = new Chat(model, { onChanged: () => sidebar.refresh(chat.conversation.id), onServerError });
  const cluster = new ClusterView({ onServerError });
  const sidebar = new Sidebar({
    onOpen: (id) => goTo(id),
    onDeleted: (id) => (id === chat.conversation.id ? goTo(null) : sidebar.refresh()),
    onMessage: showBanner,
  });
  const composer = new Composer({
    onSend: (content) => {
      const sending = chat.send(content);
      history.replaceState(null, "", `#/${chat.conversation.id}`);
      return sending;
    },
    onStop: () => chat.stop(),
    onError: showBanner,
  });

  function goTo(id) {
    const hash = id ? `#/${id}` : "#/";
    if (location.hash === hash) route();
    else location.hash = hash;
  }

  async function route() {
    const id = location.hash.replace(/^#\/?/, "");
    const isCluster = id === "cluster";
    byId("chat-view").hidden = isCluster;
    byId("to-chat").toggleAttribute("aria-current", !isCluster);
    byId("to-cluster").toggleAttribute("aria-current", isCluster);
    showSidebar(false);
    cluster.show(isCluster);
    if (isCluster) {
      document.title = `${text("cluster")} · ${model.name}`;
      return;
    }
    if (!(await chat.open(id || null))) history.replaceState(null, "", "#/");
    await sidebar.refresh(chat.conversation.id);
    if (matchMedia("(pointer: fine)").matches) byId("input").focus();
  }

  function showSidebar(isShown) {
    document.body.classList.toggle("with-sidebar", isShown);
    byId("menu").setAttribute("aria-expanded", String(isShown));
  }

  byId("menu").addEventListener("click", () => showSidebar(!document.body.classList.contains("with-sidebar")));
  byId("title").addEventListener("change", async () => {
    chat.conversation.title = byId("title").value.trim();
    chat.showState();
    if (!chat.isNew || chat.path.length) await chat.save();
  });
  byId("settings").addEventListener("click", async () => {
    const settings = await editSettings(chat.conversation.settings, model.sampling);
    if (settings === null) return;
    chat.conversation.settings = settings;
    if (chat.path.length) await chat.save();
  });
  byId("export").addEventListener("click", async () => {
    const buttons = [
      cancelButton(),
      { label: text("exportMarkdown"), value: "md" },
      { label: text("exportJson"), value: "json", kind: "primary" },
    ];
    const form = await ask(text("exportTitle"), [], buttons);
    const name = (chat.conversation.title || text("untitled")).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
    if (form === "md") download(`${name}.md`, "text/markdown", exchange.toMarkdown(chat.conversation, chat.path));
    if (form === "json") download(`${name}.json`, "application/json", await exchange.toJson([chat.conversation]));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("dialog").open) return;
    if (document.body.classList.contains("with-sidebar")) showSidebar(false);
    else chat.stop();
  });
  store.onChange((id) => {
    if (id === chat.conversation.id && !chat.answer) chat.open(id);
    sidebar.refresh();
  });
  addEventListener("hashchange", route);
  addEventListener("pagehide", () => {
    for (const answer of chat.answers.values()) answer.save();
  });

  const isOpen = store.open().then(route);
  connect().then(async () => {
    await isOpen;
    composer.seesImages = model.seesImages;
    if (!chat.answer && !byId("cluster-view").offsetParent) chat.draw();
    const status = await getJson("v1/cluster").catch(() => null);
    model.sampling = status?.sampling ?? {};
  });
}

main();
