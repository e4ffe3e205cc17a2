// A task with tools by the Vercel AI SDK and its default OpenAI provider, whose later steps refer to stored items.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, isStepCount, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const sent = [];
const openai = createOpenAI({
  baseURL: process.env.BASE_URL,
  apiKey: 'any',
  fetch: (url, options) => {
    sent.push(JSON.parse(options.body));
    return fetch(url, options);
  },
});
const tools = {
  read_file: tool({
    description: 'Read a file',
    inputSchema: z.object({ path: z.string() }),
    execute: async ({ path }) => `content of ${path}`,
  }),
};
const options = {
  model: openai('kimi-mini'),
  tools,
  stopWhen: (stepCountIs ?? isStepCount)(5),
  prompt: 'Compare the files',
  providerOptions: { openai: { reasoningEffort: 'medium', reasoningSummary: 'auto', forceReasoning: true } },
};
const { text, steps } = await generateText(options);
const streamed = streamText(options);
let deltas = '';
for await (const delta of streamed.textStream) deltas += delta;
console.log(
  JSON.stringify({
    text,
    reasoning: steps.map((step) => step.reasoningText ?? null),
    calls: steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input])),
    deltas,
    streamedText: await streamed.text,
    sent: sent.map((body) => body.input.map((item) => item.type ?? item.role)),
  }),
);
