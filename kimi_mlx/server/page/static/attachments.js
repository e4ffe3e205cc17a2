// Files of the next message: text files, and images if the model sees images.

import { byId, element } from "./dom.js";
import { bytes, text } from "./i18n.js";
import { fenced } from "./markdown.js";

const MAX_TEXT_BYTES = 1_000_000;
const MAX_IMAGE_BYTES = 30_000_000;
const RESIZE_ABOVE_BYTES = 6_000_000;
const MAX_SIDE = 4096;
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// The files that are attached to the next message.
export class Attachments {
  constructor(onError) {
    this.items = [];
    this.onError = onError;
    this.seesImages = false;
    this.node = byId("attachments");
  }

  async add(files) {
    for (const file of files) {
      try {
        this.items.push(await this.read(file));
      } catch (error) {
        this.onError(error.message);
      }
    }
    this.show();
  }

  async read(file) {
    if (file.type.startsWith("image/") && file.type !== "image/svg+xml") {
      if (!this.seesImages) throw new Error(text("noImages", { name: file.name }));
      if (file.size > MAX_IMAGE_BYTES) throw tooLarge(file, MAX_IMAGE_BYTES);
      const url = await imageUrl(file);
      return { part: { type: "image_url", image_url: { url }, name: file.name } };
    }
    if (file.size > MAX_TEXT_BYTES) throw tooLarge(file, MAX_TEXT_BYTES);
    const data = await file.arrayBuffer();
    let content;
    try {
      content = new TextDecoder("utf-8", { fatal: true }).decode(data);
    } catch {
      throw new Error(text("notText", { name: file.name }));
    }
    if (content.includes("\0")) throw new Error(text("notText", { name: file.name }));
    return { size: file.size, part: { type: "text", text: quoted(file.name, content), name: file.name } };
  }

  // Return the content of a message: text alone, or parts with the files first.
  contentWith(message) {
    if (this.items.length === 0) return message;
    const parts = this.items.map((item) => item.part);
    return message ? [...parts, { type: "text", text: message }] : parts;
  }

  clear() {
    this.items = [];
    this.show();
  }

  show() {
    const remove = (item) => {
      this.items = this.items.filter((other) => other !== item);
      this.show();
      byId("input").focus();
    };
    this.node.replaceChildren(...this.items.map((item) => chipOf(item.part, () => remove(item), item.size)));
  }
}

// Return the element of an attached file, with a button that removes it.
export function chipOf(part, onRemove, size = null) {
  const shown = part.image_url
    ? element("img", { src: part.image_url.url, alt: part.name ?? "" })
    : element("span", { dir: "auto" }, size === null ? part.name : `${part.name} · ${bytes(size)}`);
  const label = text("remove", { name: part.name ?? text("image") });
  const button = element("button", { type: "button", class: "icon", "aria-label": label, onclick: onRemove }, "×");
  return element("span", { class: "attachment" }, shown, button);
}

const tooLarge = (file, limit) =>
  new Error(text("tooLarge", { name: file.name, size: bytes(file.size), limit: bytes(limit) }));

// Return a text file as text of a message: its name, then its content as code.
const quoted = (name, content) => `${name.replaceAll(/[`\n]/g, " ")}:\n${fenced(content)}`;

// Return an image as a data URL; a large one, or one of another format, is encoded again as JPEG.
async function imageUrl(file) {
  if (SENT_AS_THEY_ARE.includes(file.type) && file.size <= RESIZE_ABOVE_BYTES) return dataUrl(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(text("badImage", { name: file.name }));
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", {});
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
