// The list of conversations: open, search, rename, delete, import and export.

import { download, importFile, toJson } from "./conversation_files.js";
import { askTitle, confirmDelete } from "./dialog.js";
import { byId, element } from "./dom.js";
import { text } from "./i18n.js";
import * as store from "./store.js";

const SEARCH_AFTER_MS = 150;

export class Sidebar {
  // `onOpen` receives the id of a conversation, or null for a new one; `onDelete` an id before it is deleted, `onDeleted`
  // after that; `onRename` an id and a title; `onImported` ids; `onMessage` a text; `isAnswering` returns whether an id is being answered.
  constructor({ onOpen, onDelete, onDeleted, onRename, onImported, onMessage, isAnswering }) {
    Object.assign(this, { onOpen, onDelete, onDeleted, onRename, onImported, onMessage, isAnswering });
    this.current = null;
    byId("new").addEventListener("click", () => onOpen(null));
    byId("search").addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.refresh(), SEARCH_AFTER_MS);
    });
    byId("export-all").addEventListener("click", () => this.exportAll());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", () => this.importFile());
  }

  async refresh(current = this.current) {
    this.current = current;
    const number = (this.refreshes = (this.refreshes ?? 0) + 1);
    const query = byId("search").value.trim();
    const found = query ? await store.search(query) : null;
    const items = (await store.conversations()).filter((item) => !found || found.has(item.id));
    if (number !== this.refreshes) return; // a later one is under way
    byId("conversations").replaceChildren(
      ...(items.length ? items.map((item) => this.itemNode(item)) : [this.emptyNode(query)]),
    );
  }

  emptyNode(query) {
    return element("li", { class: "hint" }, query ? text("nothingFound", { query }) : text("noConversations"));
  }

  itemNode(item) {
    const title = item.title || text("untitled");
    const isCurrent = item.id === this.current;
    const link = element(
      "a",
      { href: `#/${item.id}`, "aria-current": isCurrent ? "page" : null, title, dir: "auto" },
      title,
      this.isAnswering(item.id) ? element("span", { class: "dot", role: "img", "aria-label": text("answeringNow") }) : null,
    );
    const rename = async () => {
      const renamed = await askTitle(item.title);
      if (renamed !== null) this.onRename(item.id, renamed);
    };
    const remove = async () => {
      if (!(await confirmDelete(title))) return;
      this.onDelete(item.id);
      await store.deleteConversation(item.id);
      this.onDeleted(item.id);
    };
    const button = (label, sign, onclick) =>
      element("button", { type: "button", class: "icon", title: label, "aria-label": `${label}: ${title}`, onclick }, sign);
    const buttons = [button(text("rename"), "✎", rename), button(text("delete"), "×", remove)];
    return element("li", { class: isCurrent ? "current" : "" }, link, ...buttons);
  }

  async exportAll() {
    const items = await store.conversations();
    download("kimi-mlx-conversations.json", "application/json", await toJson(items));
  }

  async importFile() {
    const input = byId("import-file");
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      this.onImported(await importFile(file));
    } catch (error) {
      this.onMessage(text("importFailed", { message: error.message }));
    }
    await this.refresh();
  }
}
