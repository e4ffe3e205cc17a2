// The view of the cluster: what each host does, and what is wrong. Nothing is requested while it is not visible.

import { readEvents, request } from "./api.js";
import { byId, element, svg } from "./dom.js";
import { bytes, count, decimal, duration, text } from "./i18n.js";
import { plot } from "./plot.js";

const RETRY_MS = 3000;
const AXES = ["layers", "heads", "experts", "expert_rows"];

export class ClusterView {
  constructor({ onServerError }) {
    this.onServerError = onServerError;
    this.node = byId("cluster-view");
    this.isShown = false;
    document.addEventListener("visibilitychange", () => this.update());
  }

  show(isShown) {
    this.isShown = isShown;
    this.node.hidden = !isShown;
    this.update();
  }

  update() {
    const isNeeded = this.isShown && document.visibilityState === "visible";
    if (isNeeded && !this.controller) this.follow();
    if (!isNeeded && this.controller) {
      this.controller.abort();
      this.controller = null;
    }
  }

  async follow() {
    const controller = (this.controller = new AbortController());
    if (!this.node.childElementCount) this.node.replaceChildren(element("p", { class: "hint" }, text("loading")));
    while (!controller.signal.aborted) {
      try {
        const response = await request("v1/cluster/events", { signal: controller.signal });
        for await (const { event, data } of readEvents(response)) if (event === "status") this.draw(JSON.parse(data));
      } catch (error) {
        if (error.name === "AbortError") return;
        this.onServerError(error);
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  draw(status) {
    const open = [...this.node.querySelectorAll("details[open]")].map((node) => node.dataset.name);
    this.node.replaceChildren(
      summaryOf(status),
      section("placement", placementOf(status)),
      section("rank", ranksOf(status)),
      section("speed", speedOf(status)),
      section("answersTitle", answersOf(status)),
      section("promptCache", cacheOf(status)),
      section("restarts", restartsOf(status)),
      section("findings", findingsOf(status)),
    );
    for (const node of this.node.querySelectorAll("details")) node.open = open.includes(node.dataset.name);
  }
}

const section = (name, content) => content && element("section", {}, element("h2", {}, text(name)), content);

function pairs(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", {}, ...known.flatMap(([name, value]) => [element("dt", {}, text(name)), element("dd", {}, value)]));
}

function table(names, rows) {
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, text(name))));
  const body = rows.map((row) => element("tr", {}, ...row.map((value) => element("td", {}, value ?? "–"))));
  return element("div", { class: "table", tabindex: "0" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
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
      rank.memory_bytes === null ? null : bytes(rank.memory_bytes),
      free,
      machine?.gpu_limit_bytes ? bytes(machine.gpu_limit_bytes) : null,
      rank.step === null ? null : `${count(rank.step)} (${rank.work})`,
      rank.last_message_s === null ? null : text("ago", { time: duration(rank.last_message_s) }),
    ];
  });
  return table(["rank", "host", "holds", "weights", "cache", "used", "free", "wiredLimit", "step", "heartbeat"], rows);
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
  if (!findings) return null;
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
