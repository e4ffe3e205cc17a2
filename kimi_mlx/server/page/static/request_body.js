// The body of a request for an answer, in OpenAI's format.

import { canContinue } from "./messages.js";
import { NUMBERS } from "./settings.js";

// Return the body for the messages of a branch, with the settings of the conversation. What has come of the answer is
// continued if that is possible.
export function requestBody(path, settings, answer) {
  const messages = path.map(toOpenAI);
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const isContinued = canContinue(answer);
  if (isContinued) messages.push({ ...toOpenAI(answer), partial: true });
  const body = { messages, stream: true, return_progress: true, stream_options: { include_usage: true } };
  for (const { name } of NUMBERS) {
    if (settings[name] !== undefined) body[name] = settings[name];
  }
  if (settings.thinking !== undefined) body.thinking = { type: settings.thinking ? "enabled" : "disabled" };
  if (settings.tools?.length) body.tools = settings.tools;
  if (settings.schema && !isContinued) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: settings.schema } };
  }
  return body;
}

function toOpenAI(message) {
  const value = { role: message.role, content: message.content };
  if (typeof message.content !== "string") value.content = message.content.map(({ name, ...part }) => part);
  if (message.reasoning) value.reasoning_content = message.reasoning;
  const calls = (message.toolCalls ?? []).filter((call) => !call.broken);
  if (calls.length) {
    value.tool_calls = calls.map(({ id, name, arguments: json }) => ({
      id,
      type: "function",
      function: { name, arguments: json },
    }));
  }
  if (message.toolCallId) value.tool_call_id = message.toolCallId;
  return value;
}
