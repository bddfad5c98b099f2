// The official Anthropic client for JavaScript.
import Anthropic from "@anthropic-ai/sdk";
import { key, main, model, parameters, question, url, weatherQuestion } from "./common.mjs";

const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
const ask = { model, max_tokens: 96, temperature: 0, messages: [{ role: "user", content: question }] };
const weather = { name: "weather", description: "The weather in a city.", input_schema: parameters };

await main({
  async text() {
    return { text: (await client.messages.create(ask)).content[0].text };
  },
  async stream() {
    return { text: await client.messages.stream(ask).finalText() };
  },
  async tools() {
    const asked = { ...ask, messages: [{ role: "user", content: weatherQuestion }], tools: [weather] };
    const message = await client.messages.stream({ ...asked, tool_choice: { type: "any" } }).finalMessage();
    return message.content.find((block) => block.type === "tool_use").input;
  },
  async count_tokens() {
    return { tokens: (await client.messages.countTokens({ model, messages: ask.messages })).input_tokens };
  },
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    return { found: found.includes(model) };
  },
});
