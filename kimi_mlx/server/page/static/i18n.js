// Texts of the interface, in English and Chinese; numbers in the user's format.

const ENGLISH = {
  skipToInput: "Skip to the message", views: "Views", chat: "Chat", cluster: "Cluster", conversations: "Conversations",
  newConversation: "New conversation", searchConversations: "Search conversations", importFile: "Import", exportAll: "Export all",
  conversation: "Conversation", title: "Title", settings: "Settings", exportConversation: "Export", messages: "Messages",
  typeMessage: "Message", message: "Message", attach: "Attach", camera: "Camera", send: "Send", stop: "Stop",
  you: "You", tool: "Tool", system: "Instructions", thinking: "Thinking…", thought: "Thought for {seconds} s",
  copy: "Copy", copied: "Copied", copyCode: "Copy code", retry: "Retry", edit: "Edit", cancel: "Cancel", save: "Save",
  remove: "Remove", delete: "Delete", continueAnswer: "Continue", previousVersion: "Previous version",
  nextVersion: "Next version", versionOf: "{number} of {count}", sendAgain: "Send",
  answering: "Answering", answerDone: "Answer complete: {tokens} tokens", answerStopped: "Stopped",
  reading: "Reading {done} of {total} tokens", left: "{time} left", waitingForModel: "Waiting for the model",
  stoppedByUser: "stopped", cutOff: "unfinished: the page was closed or the connection was lost",
  lengthLimit: "stopped at the token limit", emptyAnswer: "no answer",
  statistics: "{tokens} tokens · {rate} tok/s · prompt {prompt} ({cached} cached) · first token {first}",
  contextUsed: "{used} of {total} tokens",
  empty: "Ask {model} something.", emptyHint: "Conversations stay in this browser.",
  noConversations: "No conversations yet", nothingFound: "Nothing found for “{query}”", untitled: "New conversation",
  deleteConversation: "Delete “{title}”?", deleteWarning: "It is removed from this browser and cannot be restored.",
  keyTitle: "API key", keyNeeded: "This server needs an API key. It is kept until this tab is closed.",
  keyWrong: "The server refuses this key.", key: "Key", use: "Use",
  serverGone: "Cannot reach the server. Trying again…", serverBack: "The server is back.",
  busy: "The server's queue is full. Try again in {seconds} s.", failed: "The server refuses: {message}",
  notUp: "The model is not available: {reason}", lostConnection: "The connection was lost. The answer so far is kept.",
  ringNotice: "{reason}. The answer continues once the ring is back.", ringBack: "The ring is back; the answer continues.",
  systemPrompt: "Instructions (system prompt)", temperature: "Temperature", topP: "Top p", topK: "Top k", minP: "Min p",
  seed: "Seed", maxTokens: "Maximum tokens", thinkingMode: "Thinking", modelDefault: "Model's default", on: "On", off: "Off",
  schema: "JSON schema of the answer", tools: "Tools (JSON, OpenAI's format)", toolsHint: "You enter the results of calls yourself.",
  defaults: "Defaults", invalidJson: "Not valid JSON: {message}", notAList: "Tools must be a list", notAnObject: "The schema must be an object",
  outOfRange: "Between {low} and {high}",
  toolCall: "Call of {name}", toolResult: "Result", sendResults: "Send results", enterResult: "Enter the result of the call",
  brokenCall: "broken call",
  exportJson: "As JSON", exportMarkdown: "As Markdown", exportTitle: "Export",
  imported: "{count} conversations imported", importFailed: "Cannot import this file: {message}",
  notText: "{name} is not a text file", tooLarge: "{name} has {size}; at most {limit}", noImages: "This model does not see images",
  badImage: "{name} cannot be read as an image",
  storageFull: "This browser cannot save: {message}", privateStorage: "This browser does not keep conversations: they end with this tab.",
  inOtherTab: "being answered in another tab", deletedElsewhere: "This conversation was deleted in another tab.",
  toEnd: "To the end", notCopied: "Cannot copy", rename: "Rename", answeringNow: "answering",
  busyRetry: "The server's queue is full. Trying again in {seconds} s.", keyMissing: "Enter the API key",
  stateReady: "Ready", stateBusy: "Answering {active}", stateQueue: "{waiting} waiting", stateDown: "Not available", stateGone: "Not reachable",
  stateRestarting: "Restarting", unreachable: "No answer: the connection was lost.", ranks: "Ranks",
  memoryText: "{used} of {total}", notChecked: "No checks were made for this server. To check this machine, or hosts:",
  loading: "Loading…", up: "Running", down: "Not available", placement: "Placement", uptime: "Uptime", context: "Context",
  versions: "Versions", rank: "Rank", host: "Host", holds: "Holds", weights: "Weights", cache: "Cache", free: "Free", used: "Used",
  memory: "Memory", wiredLimit: "GPU limit", peak: "Peak", vision: "vision", step: "Step", heartbeat: "Last message", link: "Link", sums: "Sums",
  queue: "Queue", ofCapacity: "{waiting} of {capacity}", answersTitle: "Answers in progress",
  noAnswers: "Nothing is running", speed: "Speed", generated: "generated", read: "read", tokPerS: "tok/s", lastMinutes: "tokens per second, last {minutes} min",
  promptCache: "Prompt cache", hitRate: "Reused", reusedOf: "{reused} of {read} prompt tokens ({share} %)", expert_rows: "rows of each expert", restarts: "Restarts", noRestarts: "No restarts", ago: "{time} ago",
  findings: "Doctor's findings", noFindings: "No problems found", remedy: "Fix", layers: "layers", heads: "heads", experts: "experts",
  plotText: "{generated} tok/s generated, {read} tok/s read; highest {highest}", images: "images", state: "State",
  tokens: "tokens", queued: "queued", prefill: "reading", decode: "answering",
};

const CHINESE = {
  skipToInput: "跳到消息输入框", views: "视图", chat: "聊天", cluster: "集群", conversations: "对话",
  newConversation: "新对话", searchConversations: "搜索对话", importFile: "导入", exportAll: "全部导出",
  conversation: "对话", title: "标题", settings: "设置", exportConversation: "导出", messages: "消息",
  typeMessage: "输入消息", message: "消息", attach: "附件", camera: "拍照", send: "发送", stop: "停止",
  you: "你", tool: "工具", system: "系统提示", thinking: "思考中…", thought: "思考了 {seconds} 秒",
  copy: "复制", copied: "已复制", copyCode: "复制代码", retry: "重试", edit: "编辑", cancel: "取消", save: "保存",
  remove: "移除", delete: "删除", continueAnswer: "继续", previousVersion: "上一个版本",
  nextVersion: "下一个版本", versionOf: "{number} / {count}", sendAgain: "发送",
  answering: "正在回答", answerDone: "回答完毕：{tokens} 个 token", answerStopped: "已停止",
  reading: "正在读取 {done} / {total} 个 token", left: "剩余 {time}", waitingForModel: "等待模型",
  stoppedByUser: "已停止", cutOff: "未完成：页面被关闭或连接中断",
  lengthLimit: "已达到 token 上限", emptyAnswer: "没有回答",
  statistics: "{tokens} token · {rate} tok/s · 提示 {prompt}（缓存 {cached}）· 首个 token {first}",
  contextUsed: "{used} / {total} token",
  empty: "向 {model} 提问。", emptyHint: "对话保存在此浏览器中。",
  noConversations: "还没有对话", nothingFound: "没有找到“{query}”", untitled: "新对话",
  deleteConversation: "删除“{title}”？", deleteWarning: "它将从此浏览器中移除，无法恢复。",
  keyTitle: "API 密钥", keyNeeded: "此服务器需要 API 密钥。密钥只保留到此标签页关闭。",
  keyWrong: "服务器拒绝此密钥。", key: "密钥", use: "使用",
  serverGone: "无法连接服务器，正在重试…", serverBack: "服务器已恢复。",
  busy: "服务器队列已满，请在 {seconds} 秒后重试。", failed: "服务器拒绝：{message}",
  notUp: "模型不可用：{reason}", lostConnection: "连接中断，已保留目前的回答。",
  ringNotice: "{reason}。集群恢复后回答将继续。", ringBack: "集群已恢复，回答继续。",
  systemPrompt: "系统提示", temperature: "温度", topP: "Top p", topK: "Top k", minP: "Min p",
  seed: "随机种子", maxTokens: "最大 token 数", thinkingMode: "思考", modelDefault: "模型默认", on: "开", off: "关",
  schema: "回答的 JSON schema", tools: "工具（JSON，OpenAI 格式）", toolsHint: "调用结果由你自己填写。",
  defaults: "恢复默认", invalidJson: "不是有效的 JSON：{message}", notAList: "工具必须是列表", notAnObject: "schema 必须是对象",
  outOfRange: "应在 {low} 与 {high} 之间",
  toolCall: "调用 {name}", toolResult: "结果", sendResults: "发送结果", enterResult: "填写此调用的结果",
  brokenCall: "无效调用",
  exportJson: "导出为 JSON", exportMarkdown: "导出为 Markdown", exportTitle: "导出",
  imported: "已导入 {count} 个对话", importFailed: "无法导入此文件：{message}",
  notText: "{name} 不是文本文件", tooLarge: "{name} 大小为 {size}，上限 {limit}", noImages: "此模型不支持图片",
  badImage: "无法将 {name} 读取为图片",
  storageFull: "此浏览器无法保存：{message}", privateStorage: "此浏览器不保存对话，关闭标签页后即消失。",
  inOtherTab: "正在另一个标签页中回答", deletedElsewhere: "此对话已在另一个标签页中删除。",
  toEnd: "到末尾", notCopied: "无法复制", rename: "重命名", answeringNow: "正在回答",
  busyRetry: "服务器队列已满，{seconds} 秒后自动重试。", keyMissing: "输入 API 密钥",
  stateReady: "就绪", stateBusy: "正在回答 {active} 个", stateQueue: "{waiting} 个等待", stateDown: "不可用", stateGone: "无法连接",
  stateRestarting: "正在重启", unreachable: "没有回答：连接中断。", ranks: "各 Rank",
  memoryText: "{used} / {total}", notChecked: "此服务器没有做过检查。检查本机或其他主机：",
  loading: "加载中…", up: "运行中", down: "不可用", placement: "分布", uptime: "运行时间", context: "上下文",
  versions: "版本", rank: "Rank", host: "主机", holds: "持有", weights: "权重", cache: "缓存", free: "空闲", used: "已用",
  memory: "内存", wiredLimit: "GPU 上限", peak: "峰值", vision: "视觉", step: "步", heartbeat: "最近消息", link: "链路", sums: "求和方式",
  queue: "队列", ofCapacity: "{waiting} / {capacity}", answersTitle: "进行中的回答",
  noAnswers: "没有进行中的回答", speed: "速度", generated: "生成", read: "读取", tokPerS: "tok/s", lastMinutes: "最近 {minutes} 分钟，每秒 token 数",
  promptCache: "提示缓存", hitRate: "命中", reusedOf: "{read} 个提示 token 中的 {reused} 个（{share} %）", expert_rows: "每个专家的行", restarts: "重启", noRestarts: "没有重启", ago: "{time}前",
  findings: "检查结果", noFindings: "没有发现问题", remedy: "解决办法", layers: "层", heads: "头", experts: "专家",
  plotText: "生成 {generated} tok/s，读取 {read} tok/s，最高 {highest}", images: "图片", state: "状态",
  tokens: "token", queued: "排队", prefill: "读取", decode: "回答",
};

const isChinese = (navigator.languages?.[0] ?? navigator.language ?? "en").toLowerCase().startsWith("zh");
const TEXTS = isChinese ? CHINESE : ENGLISH;
export const locale = isChinese ? "zh-CN" : "en";
document.documentElement.lang = locale;

// Return a text, with values in the places of {names}.
export function text(name, values = {}) {
  return TEXTS[name].replace(/\{(\w+)\}/g, (place, key) => String(values[key] ?? place));
}

// Set the texts of all elements in the document that name one.
export function translate(root = document) {
  for (const node of root.querySelectorAll("[data-i18n]")) node.textContent = text(node.dataset.i18n);
  for (const node of root.querySelectorAll("[data-i18n-label]")) node.setAttribute("aria-label", text(node.dataset.i18nLabel));
  for (const node of root.querySelectorAll("[data-i18n-placeholder]")) {
    node.setAttribute("placeholder", text(node.dataset.i18nPlaceholder));
  }
}

const numbers = new Intl.NumberFormat(locale);
export const count = (value) => numbers.format(value);
export const decimal = (value, digits = 1) =>
  new Intl.NumberFormat(locale, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);

// Return a duration, such as `4.2 s`, `3 min` or `2 h 5 min`.
export function duration(seconds) {
  if (seconds < 10) return `${decimal(seconds)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} d`;
}

// Return a size in units of 1,000 bytes, as the terminal shows it.
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${power === 0 ? value : decimal(value, value < 100 ? 1 : 0)} ${units[power]}`;
}
