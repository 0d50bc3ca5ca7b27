// openai on Node: completions, chat, thoughts, tools, structured output, and responses.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const task = JSON.parse(readFileSync("task.json", "utf8"));
const model = task.model;
const client = new OpenAI({ baseURL: `${task.url}/v1`, apiKey: "-" });
const user = (content) => [{ role: "user", content }];
const City = z.object({ city: z.string(), country: z.string(), population: z.number().int() });

async function joined(stream, textOf) {
  let text = "";
  for await (const part of stream) if (part.choices.length) text += textOf(part.choices[0]) ?? "";
  return text;
}

const parts = {
  async completions() {
    const body = { model, prompt: task.prompt, max_tokens: 16, temperature: 0 };
    const whole = await client.completions.create(body);
    const stream = await client.completions.create({ ...body, stream: true });
    assert.equal(await joined(stream, (choice) => choice.text), whole.choices[0].text);
  },

  async chat() {
    const messages = [{ role: "system", content: task.system }, ...user(task.question)];
    const body = { model, messages, max_completion_tokens: 64, temperature: 0 };
    const whole = (await client.chat.completions.create(body)).choices[0].message.content;
    assert.ok(whole);
    const stream = await client.chat.completions.create({ ...body, stream: true });
    assert.equal(await joined(stream, (choice) => choice.delta.content), whole);
    assert.equal(await client.chat.completions.stream(body).finalContent(), whole);
  },

  async thought() {
    const body = { model, messages: user(task.question), max_completion_tokens: 128, temperature: 0, reasoning_effort: "high" };
    const { message } = (await client.chat.completions.create(body)).choices[0];
    assert.ok(message.reasoning && message.content);
    assert.equal(message.reasoning_content, message.reasoning);
    const stream = await client.chat.completions.create({ ...body, stream: true });
    assert.equal(await joined(stream, (choice) => choice.delta.reasoning_content), message.reasoning);
  },

  async tools() {
    const messages = user(task.weather_question);
    const offered = [{ type: "function", function: task.tool }];
    const body = { model, messages, tools: offered, tool_choice: "auto", max_completion_tokens: 128, temperature: 0 };
    const choice = (await client.chat.completions.create(body)).choices[0];
    assert.equal(choice.finish_reason, "tool_calls");
    const call = choice.message.tool_calls[0];
    assert.equal(call.function.name, "get_weather");
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Oslo" });
    const streamed = await client.chat.completions.stream(body).finalChatCompletion();
    assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    messages.push(choice.message, { role: "tool", tool_call_id: call.id, content: task.weather });
    const answer = (await client.chat.completions.create(body)).choices[0].message.content;
    assert.ok(answer.includes(task.weather), answer);
  },

  async run_tools() {
    const asked = [];
    const get = ({ city }) => (asked.push(city), task.weather);
    const tool = { type: "function", function: { ...task.tool, function: get, parse: JSON.parse } };
    const body = { model, messages: user(task.weather_question), tools: [tool], max_completion_tokens: 128, temperature: 0 };
    const answer = await client.chat.completions.runTools(body).finalContent();
    assert.deepEqual(asked, ["Oslo"]);
    assert.ok(answer.includes(task.weather), answer);
  },

  async structured() {
    const body = { model, messages: user(task.city_question), max_completion_tokens: 128, temperature: 0 };
    const form = { type: "json_schema", json_schema: { name: "city", schema: task.city_schema, strict: true } };
    const plain = await client.chat.completions.create({ ...body, response_format: form });
    assert.equal(City.parse(JSON.parse(plain.choices[0].message.content)).city, "Oslo");
    const parsed = await client.chat.completions.parse({ ...body, response_format: zodResponseFormat(City, "city") });
    assert.equal(parsed.choices[0].message.parsed.city, "Oslo");
  },

  async responses() {
    const body = { model, input: task.question, max_output_tokens: 128, temperature: 0 };
    const whole = await client.responses.create(body);
    assert.ok(whole.output_text);
    let text = "";
    for await (const event of await client.responses.create({ ...body, stream: true }))
      if (event.type === "response.output_text.delta") text += event.delta;
    assert.equal(text, whole.output_text);
    assert.equal((await client.responses.stream(body).finalResponse()).output_text, whole.output_text);
  },
};

await parts[process.argv[2]]();
console.log("passed");
