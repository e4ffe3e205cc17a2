// The list of conversations: open, search, rename, delete, import and export.

import { confirmDelete } from "./dialog.js";
import { byId, download, element } from "./dom.js";
import * as exchange from "./exchange.js";
import { text } from "./i18n.js";
import * as store from "./store.js";

const SEARCH_AFTER_MS = 150;

export class Sidebar {
  // `onOpen` receives the id of a conversation, or null for a new one; `onMessage` a text.
  constructor({ onOpen, onDeleted, onMessage }) {
    Object.assign(this, { onOpen, onDeleted, onMessage });
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
    const query = byId("search").value.trim();
    const found = query ? await store.search(query) : null;
    const items = (await store.conversations()).filter((item) => !found || found.has(item.id));
    byId("conversations").replaceChildren(
      ...(items.length ? items.map((item) => this.itemNode(item)) : [this.emptyNode(query)]),
    );
  }

  emptyNode(query) {
    return element("li", { class: "hint" }, query ? text("nothingFound", { query }) : text("noConversations"));
  }

  itemNode(item) {
    const title = item.title || text("untitled");
    const link = element(
      "a",
      { href: `#/${item.id}`, "aria-current": item.id === this.current ? "page" : null, title },
      title,
    );
    const button = element(
      "button",
      {
        type: "button",
        class: "icon",
        "aria-label": `${text("delete")}: ${title}`,
        onclick: async () => {
          if (!(await confirmDelete(title))) return;
          await store.deleteConversation(item.id);
          this.onDeleted(item.id);
        },
      },
      "×",
    );
    return element("li", {}, link, button);
  }

  async exportAll() {
    const items = await store.conversations();
    download("kimi-mlx-conversations.json", "application/json", await exchange.toJson(items));
  }

  async importFile() {
    const input = byId("import-file");
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      this.onMessage(text("imported", { count: await exchange.importFile(file) }));
    } catch (error) {
      this.onMessage(text("importFailed", { message: error.message }));
    }
    await this.refresh();
  }
}
