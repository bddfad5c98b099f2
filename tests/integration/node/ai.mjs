// Vercel's AI SDK with its providers for OpenAI (responses and chat), for what is like OpenAI, and for Anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { key, main, model, question, structureQuestion, v1, weatherQuestion } from "./common.mjs";

const openai = createOpenAI({ baseURL: v1, apiKey: key });
const compatible = createOpenAICompatible({
  name: "ours",
  baseURL: v1,
  apiKey: key,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  responses: () => openai.responses(model),
  chat: () => openai.chat(model),
  compatible: () => compatible(model),
  anthropic: () => createAnthropic({ baseURL: v1, apiKey: key })(model),
};
const fixed = (kind) => ({ model: models[kind](), maxOutputTokens: 128, temperature: 0, maxRetries: 0 });
const capital = z.object({ city: z.enum(["Paris", "Rome"]) });

await main({
  async text(kind) {
    const { text, usage } = await generateText({ ...fixed(kind), prompt: question });
    return { text, tokens: usage.outputTokens };
  },
  async stream(kind) {
    let failure;
    const onError = ({ error }) => (failure = error);
    const found = streamText({ ...fixed(kind), prompt: question, onError });
    let text = "";
    for await (const piece of found.textStream) text += piece;
    if (failure) throw failure;
    return { text, tokens: (await found.usage).outputTokens };
  },
  async structured(kind) {
    const output = Output.object({ schema: capital });
    return (await generateText({ ...fixed(kind), prompt: structureQuestion, output })).output;
  },
  async tools(kind) {
    // The first step must call; the result goes back, and the second answers.
    const seen = [];
    const weather = tool({
      description: "The weather in a city.",
      inputSchema: capital,
      execute: async ({ city }) => {
        seen.push(city);
        return "sunny";
      },
    });
    const found = streamText({
      ...fixed(kind),
      prompt: weatherQuestion,
      tools: { weather },
      toolChoice: "required",
      prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "auto" } : {}),
      stopWhen: stepCountIs(3),
    });
    await found.consumeStream();
    return { city: seen[0], steps: (await found.steps).length };
  },
});
