// The view of the cluster: what each host does, and what is wrong.

import { byId, element, svg } from "./dom.js";
import { bytes, count, decimal, duration, text } from "./i18n.js";
import { plot } from "./plot.js";

const AXES = ["layers", "heads", "experts", "expert_rows"];

export class ClusterView {
  constructor() {
    this.node = byId("cluster-view");
    this.status = null;
  }

  show(isShown) {
    this.node.hidden = !isShown;
    if (isShown) this.update(this.status);
  }

  // Show a status; null if there is none yet.
  update(status) {
    this.status = status;
    if (this.node.hidden) return;
    if (status === null) this.node.replaceChildren(element("p", { class: "hint" }, text("loading")));
    else if (!isSelecting(this.node)) this.draw(status);
  }

  draw(status) {
    const places = [...this.node.querySelectorAll("[tabindex]")].map((node) => [node.scrollLeft, node === document.activeElement]);
    const findings = section("findings", findingsOf(status));
    const isWrong = status.findings?.some(({ state }) => state !== "ok"); // what is wrong comes first
    const sections = [
      summaryOf(status),
      isWrong && findings,
      section("placement", placementOf(status)),
      section("ranks", ranksOf(status)),
      section("speed", speedOf(status)),
      section("answersTitle", answersOf(status)),
      section("promptCache", cacheOf(status)),
      section("restarts", restartsOf(status)),
      !isWrong && findings,
    ];
    this.node.replaceChildren(...sections.filter(Boolean));
    for (const [index, node] of this.node.querySelectorAll("[tabindex]").entries()) {
      const [left, isFocused] = places[index] ?? [0, false];
      node.scrollLeft = left;
      if (isFocused) node.focus({ preventScroll: true });
    }
  }
}

// Return whether the user has selected text, which drawing would unselect.
function isSelecting(node) {
  const selection = getSelection();
  return !selection.isCollapsed && node.contains(selection.anchorNode);
}

const section = (name, content) => content && element("section", {}, element("h2", {}, text(name)), content);

function pairs(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", {}, ...known.flatMap(([name, value]) => [element("dt", {}, text(name)), element("dd", {}, value)]));
}

// Return a table; where it does not fit, each row is a block with the names of its values.
function table(names, rows, kind = "rows") {
  const labels = names.map((name) => text(name));
  const head = element("tr", {}, ...labels.map((label) => element("th", { scope: "col" }, label)));
  const cell = (value, index) => element("td", { "data-label": labels[index], class: value === null ? "unknown" : "" }, value ?? "–");
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  return element("div", { class: `table ${kind}`, tabindex: "0" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function summaryOf(status) {
  const state = element("strong", { class: status.is_up ? "good" : "bad" }, text(status.is_up ? "up" : "down"));
  return element(
    "section",
    {},
    element("h2", {}, status.model),
    element("p", {}, state, status.reason ? ` · ${status.reason}` : ""),
    pairs([
      ["placement", status.placement],
      ["link", status.link || null],
      ["sums", status.all_reduce || null],
      ["context", status.context_tokens ? `${count(status.context_tokens)} ${text("tokens")}` : null],
      ["uptime", duration(status.uptime_s)],
      ["queue", text("ofCapacity", { waiting: count(status.waiting), capacity: count(status.queue_capacity) })],
      ["versions", Object.entries(status.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ]),
  );
}

// One bar per axis of the placement: each rank's range in its colour. Axes that all ranks hold whole are left out.
function placementOf(status) {
  if (status.ranks.length < 2) return null;
  const axes = AXES.filter((axis) => {
    const size = status.dimensions[axis];
    return size && status.ranks.some(({ holds }) => holds[axis] && holds[axis][1] - holds[axis][0] < size);
  });
  const bars = axes.map((axis) => {
    const size = status.dimensions[axis];
    const ranges = status.ranks.filter(({ holds }) => holds[axis]);
    const description = ranges.map(({ rank, holds }) => `${text("rank")} ${rank}: ${holds[axis][0]}–${holds[axis][1] - 1}`).join(", ");
    const parts = ranges.map(({ rank, holds }) =>
      svg("rect", { class: `rank-${rank % 6}`, x: holds[axis][0], y: 0, width: holds[axis][1] - holds[axis][0], height: 1 }),
    );
    const label = `${text(axis)}: ${description}`;
    const bar = svg("svg", { viewBox: `0 0 ${size} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...parts);
    return element("div", { class: "axis-row" }, element("span", {}, `${text(axis)} (${count(size)})`), bar);
  });
  const legend = status.ranks.map(({ rank, host, share }) =>
    element("li", {}, element("span", { class: `swatch rank-${rank % 6}` }), `${text("rank")} ${rank} · ${host} · ${share}`),
  );
  return element("div", { class: "placement" }, ...bars, element("ul", {}, ...legend));
}

function ranksOf(status) {
  const machines = new Map(status.machines.map((machine) => [machine.name, machine]));
  const rows = status.ranks.map((rank) => {
    const machine = machines.get(rank.host);
    const free = rank.free_bytes === null ? null : bytes(rank.free_bytes);
    return [
      String(rank.rank),
      [rank.host, machine?.chip, machine?.memory_bytes ? bytes(machine.memory_bytes) : ""].filter(Boolean).join(" · "),
      rank.share + (rank.has_vision ? `, ${text("vision")}` : ""),
      bytes(rank.weights_bytes),
      bytes(rank.cache_bytes),
      memoryBar(rank, machine) ?? (rank.memory_bytes === null ? null : bytes(rank.memory_bytes)),
      rank.peak_memory_bytes === null ? null : bytes(rank.peak_memory_bytes),
      free,
      machine?.gpu_limit_bytes ? bytes(machine.gpu_limit_bytes) : null,
      rank.step === null ? null : `${count(rank.step)} (${rank.work})`,
      rank.last_message_s === null ? null : text("ago", { time: duration(rank.last_message_s) }),
    ];
  });
  return table(["rank", "host", "holds", "weights", "cache", "used", "peak", "free", "wiredLimit", "step", "heartbeat"], rows, "wide");
}

// Return a bar with the memory of a rank's host: what the rank uses, and what the GPU may wire.
function memoryBar(rank, machine) {
  const used = rank.memory_bytes ?? rank.weights_bytes + rank.cache_bytes;
  const total = machine?.memory_bytes ?? (rank.free_bytes === null ? 0 : used + rank.free_bytes);
  if (!total) return null;
  const limit = machine?.gpu_limit_bytes;
  const label = text("memoryText", { used: bytes(used), total: bytes(total) });
  return element(
    "span",
    { class: "memory" },
    svg(
      "svg",
      { viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", "aria-label": label },
      svg("rect", { class: `rank-${rank.rank % 6}`, x: 0, y: 0, width: Math.min(100, (100 * used) / total), height: 1 }),
      ...(limit ? [svg("line", { class: "limit", x1: (100 * limit) / total, x2: (100 * limit) / total, y1: 0, y2: 1 })] : []),
    ),
    label,
  );
}

function speedOf({ rates }) {
  const now = element(
    "p",
    {},
    `${decimal(rates.completion_tok_per_s)} ${text("tokPerS")} ${text("generated")} · ${decimal(rates.prompt_tok_per_s)} ${text("tokPerS")} ${text("read")}`,
  );
  const perSecond = (values) => values.map((value) => value / rates.interval_s);
  const series = [
    { name: "generated", values: perSecond(rates.completion_tokens) },
    { name: "read", values: perSecond(rates.prompt_tokens) },
  ];
  return element("div", {}, now, plot(series, rates.interval_s));
}

function answersOf({ answers }) {
  if (!answers.length) return element("p", { class: "hint" }, text("noAnswers"));
  const rows = answers.map((answer) => [
    text({ waiting: "queued", prefill: "prefill", decode: "decode" }[answer.state]),
    duration(answer.age_s),
    answer.state === "prefill" && answer.prompt_tokens
      ? element("progress", { max: answer.prompt_tokens, value: answer.processed_tokens, "aria-label": `${answer.processed_tokens} / ${answer.prompt_tokens}` })
      : count(answer.prompt_tokens),
    count(answer.generated_tokens),
  ]);
  return table(["state", "uptime", "read", "generated"], rows);
}

function cacheOf(status) {
  const { prompt_tokens: read, reused_tokens: reused } = status;
  const share = Math.round((100 * reused) / read);
  return pairs([
    ["memory", `${count(status.cached_tokens)} ${text("tokens")}`],
    ["hitRate", read ? text("reusedOf", { reused: count(reused), read: count(read), share }) : null],
  ]);
}

function restartsOf({ restarts }) {
  if (!restarts.length) return element("p", { class: "hint" }, text("noRestarts"));
  const items = restarts.map(({ at, reason }) =>
    element("li", {}, `${text("ago", { time: duration(Math.max(0, Date.now() / 1000 - at)) })}: ${reason}`),
  );
  return element("ul", {}, ...items.reverse());
}

function findingsOf({ findings }) {
  if (!findings) return element("p", { class: "hint" }, `${text("notChecked")} `, element("code", {}, "kimi-mlx doctor"));
  if (findings.every(({ state }) => state === "ok")) return element("p", { class: "hint" }, text("noFindings"));
  const wrong = findings.filter(({ state }) => state !== "ok");
  const items = wrong.map(({ host, message, remedy, state }) =>
    element(
      "li",
      { class: state },
      element("strong", {}, host ? `${host}: ` : ""),
      message,
      remedy ? element("p", {}, `${text("remedy")}: `, element("code", {}, remedy)) : null,
    ),
  );
  return element("ul", { class: "findings" }, ...items);
}
