// The language of the interface: its texts, and numbers in its format.

import CHINESE from "./chinese.js";
import ENGLISH from "./english.js";

const isChinese = (navigator.languages?.[0] ?? navigator.language ?? "en").toLowerCase().startsWith("zh");
const TEXTS = isChinese ? CHINESE : ENGLISH;
const locale = isChinese ? "zh-CN" : "en";
document.documentElement.lang = locale;

// Return a text with values in the places of {names}. The key is a literal in every call, so that a test can check it.
export function text(key, values = {}) {
  return TEXTS[key].replace(/\{(\w+)\}/g, (place, name) => String(values[name] ?? place));
}

// Set the texts of the elements in the document that name one.
export function translate() {
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = TEXTS[node.dataset.i18n];
  for (const node of document.querySelectorAll("[data-i18n-label]")) node.setAttribute("aria-label", TEXTS[node.dataset.i18nLabel]);
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) {
    node.setAttribute("placeholder", TEXTS[node.dataset.i18nPlaceholder]);
  }
}

const numbers = new Intl.NumberFormat(locale);
export const count = (value) => numbers.format(value);
export const decimal = (value, digits = 1) =>
  new Intl.NumberFormat(locale, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);

// Return a duration, such as `4.2 s`, `3 min` or `2 h 5 min`.
export function duration(seconds) {
  if (seconds < 10) return text("seconds", { seconds: decimal(seconds) });
  if (seconds < 90) return text("seconds", { seconds: Math.round(seconds) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return text("minutes", { minutes });
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? text("hours", { hours, minutes: minutes % 60 }) : text("days", { days: Math.round(hours / 24) });
}

// Return a size of files in units of 1,000 bytes, as the terminal shows it.
export const bytes = (value) => size(value, 1000, ["B", "kB", "MB", "GB", "TB"]);

// Return a size of memory in units of 1,024 bytes, as Macs are named: one "with 512 GB" has 512 GiB.
export const memory = (value) => size(value, 1024, ["B", "KiB", "MiB", "GiB"]);

function size(value, base, units) {
  let power = 0;
  while (value >= base && power < units.length - 1) {
    value /= base;
    power += 1;
  }
  return `${power === 0 ? value : decimal(value, value < 100 ? 1 : 0)} ${units[power]}`;
}
