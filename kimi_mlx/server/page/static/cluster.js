// The view of the cluster: what each host does, and what is wrong.

import { byId, element, svg } from "./dom.js";
import { bytes, count, decimal, duration, memory, text } from "./i18n.js";
import { plot } from "./plot.js";

// Axes of a placement that are shown, with their names.
const AXES = { layers: text("layers"), heads: text("heads"), experts: text("experts"), expert_rows: text("expertRows") };

// What a rank does, as its heartbeat reports it.
const WORK = { idle: text("workIdle"), load: text("workLoad"), prefill: text("workPrefill"), decode: text("workDecode") };

const ANSWER_STATES = { waiting: text("queued"), prefill: text("prefill"), decode: text("decode") };

const FINDING_STATES = { problem: text("problem"), warning: text("warning") };

const NUM_COLORS = 6; // of ranks

export class ClusterView {
  constructor() {
    this.node = byId("cluster-view");
    this.status = null;
    this.isGone = false; // the server cannot be reached: the status is the last one that it sent
  }

  show(isShown) {
    this.node.hidden = !isShown;
    if (isShown) this.draw();
  }

  showGone() {
    if (this.isGone) return;
    this.isGone = true;
    this.draw();
  }

  // Show a status; null if there is none yet.
  update(status) {
    this.status = status;
    this.isGone = false;
    this.draw();
  }

  draw() {
    const { status } = this;
    if (this.node.hidden) return;
    if (status === null) this.node.replaceChildren(hint(this.isGone ? text("stateGone") : text("loading")));
    else if (!isSelecting(this.node)) this.drawStatus(status);
  }

  drawStatus(status) {
    const scrollable = () => [...this.node.querySelectorAll("[tabindex]")];
    const before = scrollable().map((node) => [node.scrollLeft, node === document.activeElement]);
    const findings = section(text("findings"), findingsOf(status));
    const hasProblems = status.findings?.some(({ state }) => state !== "ok"); // problems come first
    const sections = [
      summaryOf(status, this.isGone),
      hasProblems && findings,
      section(text("placement"), placementOf(status)),
      section(text("hosts"), hostsOf(status)),
      section(text("ranks"), ranksOf(status)),
      section(text("speed"), speedOf(status)),
      section(text("answers"), answersOf(status)),
      section(text("promptCache"), cacheOf(status)),
      status.drafts && section(text("drafts"), draftsOf(status)),
      status.ranks.some(({ experts }) => experts) && section(text("expertsOnDisk"), expertsOf(status)),
      section(text("restarts"), restartsOf(status)),
      !hasProblems && findings,
    ];
    this.node.replaceChildren(...sections.filter(Boolean));
    for (const [index, node] of scrollable().entries()) {
      const [scrollLeft, isFocused] = before[index] ?? [0, false];
      node.scrollLeft = scrollLeft;
      if (isFocused) node.focus({ preventScroll: true });
    }
  }
}

// Return whether the user has selected text, which drawing would unselect.
function isSelecting(node) {
  const selection = getSelection();
  return !selection.isCollapsed && node.contains(selection.anchorNode);
}

const section = (title, content) => content && element("section", {}, element("h2", {}, title), content);

const hint = (...content) => element("p", { class: "hint" }, ...content);

// Return a list of facts: names and values. Those without a value are left out.
function factList(facts) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", {}, ...known.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

// Return a table; where it does not fit, each row is a block with the labels of its values.
function table(labels, rows, kind = "rows") {
  const head = element("tr", {}, ...labels.map((label) => element("th", { scope: "col" }, label)));
  const cell = (value, index) => element("td", { "data-label": labels[index], class: value === null ? "unknown" : "" }, value ?? "–");
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  return element("div", { class: `table ${kind}`, tabindex: "0" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function wordsOf({ is_up: isUp, backend }, isGone) {
  if (isGone) return text("stateGone");
  if (isUp) return text("up");
  return backend === "ring" ? text("stateRestarting") : text("stateDown");
}

function summaryOf(status, isGone) {
  const isUp = status.is_up && !isGone;
  const reason = isGone ? text("lastKnown") : status.reason;
  const state = element("strong", { class: isUp ? "good" : "bad" }, wordsOf(status, isGone));
  return element(
    "section",
    {},
    element("h2", {}, status.model),
    element("p", {}, state, reason ? ` · ${reason}` : ""),
    factList([
      [text("placement"), status.placement],
      [text("link"), status.link],
      [text("allReduce"), status.all_reduce],
      [text("context"), status.context_tokens ? text("numTokens", { count: count(status.context_tokens) }) : null],
      [text("uptime"), duration(status.uptime_s)],
      [text("queue"), text("ofCapacity", { waiting: count(status.waiting), capacity: count(status.queue_capacity) })],
      [text("versions"), Object.entries(status.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ]),
  );
}

// Return the hosts with their versions, which may differ.
function hostsOf({ machines }) {
  if (!machines.length) return null;
  const systemOf = ({ macos_version: macos, versions }) => [
    macos && `macOS ${macos}`,
    ...Object.entries(versions).map(([name, version]) => `${name} ${version}`),
  ];
  const rows = machines.map((machine) => [
    machine.name,
    machine.chip || null,
    memoryIfKnown(machine.memory_bytes),
    memoryIfKnown(machine.gpu_limit_bytes),
    systemOf(machine).filter(Boolean).join(", ") || null,
  ]);
  return table([text("host"), text("chip"), text("memory"), text("gpuLimit"), text("versions")], rows);
}

const rankName = ({ rank }) => text("rankNumber", { rank });

const rankColor = ({ rank }) => `rank-${rank % NUM_COLORS}`;

// Return a bar per axis of the placement, with each rank's range in its colour. Axes that all ranks hold whole are left out.
function placementOf(status) {
  if (status.ranks.length < 2) return null;
  const isSplit = (axis) => {
    const size = status.dimensions[axis];
    return size && status.ranks.some(({ holds }) => holds[axis] && holds[axis][1] - holds[axis][0] < size);
  };
  const bars = Object.keys(AXES).filter(isSplit).map((axis) => axisBar(axis, status));
  const legend = status.ranks.map((rank) =>
    element("li", {}, element("span", { class: `swatch ${rankColor(rank)}` }), `${rankName(rank)} · ${rank.host} · ${rank.share}`),
  );
  return element("div", { class: "placement" }, ...bars, element("ul", {}, ...legend));
}

function axisBar(axis, { dimensions, ranks }) {
  const size = dimensions[axis];
  const ranges = ranks
    .filter(({ holds }) => holds[axis])
    .map((rank) => ({ rank, start: rank.holds[axis][0], stop: rank.holds[axis][1] }));
  const description = ranges.map(({ rank, start, stop }) => `${rankName(rank)}: ${start}–${stop - 1}`).join(", ");
  const bar = svg(
    "svg",
    { viewBox: `0 0 ${size} 1`, preserveAspectRatio: "none", role: "img", "aria-label": `${AXES[axis]}: ${description}` },
    ...ranges.map(({ rank, start, stop }) => svg("rect", { class: rankColor(rank), x: start, y: 0, width: stop - start, height: 1 })),
  );
  return element("div", { class: "axis-row" }, element("span", {}, `${AXES[axis]} (${count(size)})`), bar);
}

const memoryIfKnown = (value) => (value === null || value === undefined ? null : memory(value));

function ranksOf(status) {
  const machines = new Map(status.machines.map((machine) => [machine.name, machine]));
  const columns = [
    [text("rank"), ({ rank }) => String(rank)],
    [text("host"), ({ host }, machine) => [host, machine?.chip, memoryIfKnown(machine?.memory_bytes)].filter(Boolean).join(" · ")],
    [text("holds"), (rank) => rank.share + (rank.has_vision ? `, ${text("vision")}` : "")],
    [text("weights"), (rank) => memory(rank.weights_bytes)],
    [text("cache"), (rank) => memory(rank.cache_bytes)],
    [text("used"), (rank, machine) => memoryBar(rank, machine) ?? memoryIfKnown(rank.memory_bytes)],
    [text("peak"), (rank) => memoryIfKnown(rank.peak_memory_bytes)],
    [text("free"), (rank) => memoryIfKnown(rank.free_bytes)],
    [text("gpuLimit"), (rank, machine) => memoryIfKnown(machine?.gpu_limit_bytes)],
    [text("step"), ({ step, work }) => (step === null ? null : `${count(step)} (${WORK[work] ?? work})`)],
    [text("lastMessage"), (rank) => (rank.last_message_s === null ? null : text("ago", { time: duration(rank.last_message_s) }))],
  ];
  const rows = status.ranks.map((rank) => columns.map(([, value]) => value(rank, machines.get(rank.host))));
  return table(columns.map(([label]) => label), rows, "wide");
}

// Return a bar with the memory of a rank's host: what the rank uses, and what the GPU may wire.
function memoryBar(rank, machine) {
  const used = rank.memory_bytes ?? rank.weights_bytes + rank.cache_bytes;
  const total = machine?.memory_bytes ?? (rank.free_bytes === null ? 0 : used + rank.free_bytes);
  if (!total) return null;
  const limit = machine?.gpu_limit_bytes;
  const label = text("usedOf", { used: memory(used), total: memory(total) });
  const width = Math.min(100, (100 * used) / total);
  return element(
    "span",
    { class: "memory" },
    svg(
      "svg",
      { viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", "aria-label": label },
      svg("rect", { class: rankColor(rank), x: 0, y: 0, width, height: 1 }),
      ...(limit ? [svg("line", { class: "limit", x1: (100 * limit) / total, x2: (100 * limit) / total, y1: 0, y2: 1 })] : []),
    ),
    label,
  );
}

function speedOf({ rates }) {
  const perSecond = (values) => values.map((value) => value / rates.interval_s);
  const now = text("rate", { generated: decimal(rates.completion_tok_per_s), read: decimal(rates.prompt_tok_per_s) });
  const series = [
    { name: "generated", label: text("generated"), values: perSecond(rates.completion_tokens) },
    { name: "read", label: text("read"), values: perSecond(rates.prompt_tokens) },
  ];
  return element("div", {}, element("p", {}, now), plot(series, rates.interval_s));
}

function answersOf({ answers }) {
  if (!answers.length) return hint(text("noAnswers"));
  const rows = answers.map((answer) => [
    ANSWER_STATES[answer.state],
    duration(answer.age_s),
    answer.state === "prefill" && answer.prompt_tokens ? prefillBar(answer) : count(answer.prompt_tokens),
    count(answer.generated_tokens),
  ]);
  return table([text("state"), text("age"), text("promptTokens"), text("newTokens")], rows);
}

function prefillBar({ processed_tokens: value, prompt_tokens: max }) {
  return element("progress", { max, value, "aria-label": text("reading", { done: count(value), total: count(max) }) });
}

function cacheOf({ cached_tokens: cached, prompt_cache: cache }) {
  const [blocks, size, limit] = [count(cache.disk_blocks), bytes(cache.disk_bytes), bytes(cache.disk_limit_bytes)];
  const hits = cache.memory_hit_tokens + cache.disk_hit_tokens;
  const share = Math.round(100 * cache.hit_rate);
  const isUsed = cache.hit_rate !== null;
  const tokens = (number) => text("numTokens", { count: count(number) });
  return factList([
    [text("inMemory"), tokens(cached)],
    [text("onDisk"), cache.has_disk ? text("blocksOnDisk", { blocks, size, limit }) : text("noDiskCache")],
    [text("hitRate"), isUsed ? text("hitsOf", { hits: count(hits), prompt: count(cache.prompt_tokens), share }) : null],
    [text("memoryHits"), isUsed ? tokens(cache.memory_hit_tokens) : null],
    [text("diskHits"), isUsed && cache.has_disk ? tokens(cache.disk_hit_tokens) : null],
    [text("misses"), isUsed ? tokens(cache.miss_tokens) : null],
  ]);
}

function draftsOf({ drafts: { drafted_tokens: drafted, accepted_tokens: accepted, off_reason: reason } }) {
  const share = Math.round((100 * accepted) / drafted);
  return factList([
    [text("state"), reason ? text("draftsOff", { reason }) : text("draftsOn")],
    [text("accepted"), drafted ? text("acceptedOf", { accepted: count(accepted), drafted: count(drafted), share }) : null],
  ]);
}

// The experts of all ranks that read some from their disks.
function expertsOf({ ranks }) {
  const counters = ranks.map(({ experts }) => experts).filter(Boolean);
  const sum = (name) => counters.reduce((total, experts) => total + experts[name], 0);
  const [kept, total, hits, guesses] = ["kept_experts", "num_experts", "hits", "guesses"].map(sum);
  const needed = hits + sum("misses");
  const percent = (part, whole) => `${Math.round((100 * part) / whole)}%`;
  return factList([
    [text("inMemory"), text("keptOf", { kept: count(kept), total: count(total), share: Math.round((100 * kept) / total) })],
    [text("hitRate"), needed ? percent(hits, needed) : null],
    [text("readFromDisk"), bytes(sum("bytes_read"))],
    [text("waited"), duration(Math.max(...counters.map((experts) => experts.wait_seconds)))],
    [text("guessesRight"), guesses ? percent(sum("guesses_right"), guesses) : null],
  ]);
}

function restartsOf({ restarts, started_at: startedAt, uptime_s: uptime }) {
  if (!restarts.length) return hint(text("noRestarts"));
  const items = restarts.map(({ at, reason, downtime_s: downtime }) => {
    const age = text("ago", { time: duration(Math.max(0, startedAt + uptime - at)) }); // by the server's clock
    const outcome = downtime === null ? text("stateRestarting") : text("upAfter", { time: duration(downtime) });
    return element("li", {}, `${age}: ${reason} · ${outcome}`);
  });
  return element("ul", {}, ...items.reverse());
}

function findingsOf({ findings }) {
  if (!findings) return hint(`${text("notChecked")} `, element("code", {}, "kimi-mlx doctor"));
  const problems = findings.filter(({ state }) => state !== "ok");
  if (!problems.length) return hint(text("noFindings"));
  const items = problems.map(({ host, message, remedy, state }) =>
    element(
      "li",
      {},
      element("strong", { class: state === "problem" ? "bad" : "" }, FINDING_STATES[state]),
      ` · ${host ? `${host}: ` : ""}${message}`,
      remedy ? element("p", {}, `${text("remedy")}: `, element("code", {}, remedy)) : null,
    ),
  );
  return element("ul", { class: "findings" }, ...items);
}
