// LangChain.js: ChatOpenAI on both of OpenAI's APIs, and ChatAnthropic.
import { ChatAnthropic } from "@langchain/anthropic";
import { ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import { key, main, model, question, structureQuestion, url, v1, weatherQuestion } from "./common.mjs";

const fixed = { model, apiKey: key, temperature: 0, maxTokens: 128, maxRetries: 0 };
const models = {
  chat: () => new ChatOpenAI({ ...fixed, configuration: { baseURL: v1 } }),
  responses: () => new ChatOpenAI({ ...fixed, configuration: { baseURL: v1 }, useResponsesApi: true }),
  anthropic: () => new ChatAnthropic({ ...fixed, anthropicApiUrl: url }),
};
const capital = z.object({ city: z.enum(["Paris", "Rome"]) });
const weather = tool(async () => "sunny", { name: "weather", description: "The weather in a city.", schema: capital });

await main({
  async text(kind) {
    const found = await models[kind]().invoke(question);
    return { text: found.text, tokens: found.usage_metadata.output_tokens };
  },
  async stream(kind) {
    let text = "";
    for await (const piece of await models[kind]().stream(question)) text += piece.text;
    return { text };
  },
  async structured(kind) {
    const method = kind === "anthropic" ? "functionCalling" : "jsonSchema";
    return models[kind]().withStructuredOutput(capital, { method, name: "capital" }).invoke(structureQuestion);
  },
  async tools(kind) {
    const choice = kind === "anthropic" ? "any" : "required";
    const called = await models[kind]().bindTools([weather], { tool_choice: choice }).invoke(weatherQuestion);
    const [call] = called.tool_calls;
    const result = new ToolMessage({ content: "sunny", tool_call_id: call.id });
    const talk = [{ role: "user", content: weatherQuestion }, called, result];
    await models[kind]().bindTools([weather]).invoke(talk);
    return call.args;
  },
});
