// The official OpenAI client for JavaScript.
import OpenAI from "openai";
import { key, main, model, parameters, question, v1, weatherQuestion } from "./common.mjs";

const client = new OpenAI({ baseURL: v1, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: question }];
const chat = { model, messages, max_tokens: 96, temperature: 0 };
const response = { model, input: question, max_output_tokens: 96, temperature: 0 };
const schema = { name: "capital", strict: true, schema: parameters };

await main({
  async chat() {
    return { text: (await client.chat.completions.create(chat)).choices[0].message.content };
  },
  async chat_stream() {
    const stream = client.chat.completions.stream({ ...chat, stream_options: { include_usage: true } });
    const text = await stream.finalContent();
    return { text, tokens: (await stream.totalUsage()).completion_tokens };
  },
  async chat_structured() {
    const format = { type: "json_schema", json_schema: schema };
    const found = await client.chat.completions.create({ ...chat, response_format: format });
    return JSON.parse(found.choices[0].message.content);
  },
  async chat_tools() {
    const weather = { name: "weather", description: "The weather in a city.", parameters };
    const asked = { ...chat, tool_choice: "required", messages: [{ role: "user", content: weatherQuestion }] };
    const stream = client.chat.completions.stream({ ...asked, tools: [{ type: "function", function: weather }] });
    const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
    return JSON.parse(call.function.arguments);
  },
  async responses() {
    return { text: (await client.responses.create(response)).output_text };
  },
  async responses_stream() {
    let text = "";
    for await (const event of client.responses.stream(response)) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    return { text };
  },
  async responses_structured() {
    const format = { type: "json_schema", ...schema };
    const found = await client.responses.create({ ...response, text: { format } });
    return JSON.parse(found.output_text);
  },
  async responses_tools() {
    const weather = { type: "function", name: "weather", description: "The weather in a city.", parameters };
    const asked = { ...response, input: weatherQuestion, tools: [weather], tool_choice: "required" };
    const stream = client.responses.stream(asked);
    for await (const _ of stream);
    const [call] = (await stream.finalResponse()).output.filter((item) => item.type === "function_call");
    return JSON.parse(call.arguments);
  },
});
