// Vercel's AI SDK: completions, chat, thoughts, tools, objects, and OpenAI's own provider, which asks for responses.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, Output, stepCountIs, streamObject, streamText, tool } from "ai";

const task = JSON.parse(readFileSync("task.json", "utf8"));
const baseURL = `${task.url}/v1`;
const provider = createOpenAICompatible({ name: "galaxyline", baseURL, supportsStructuredOutputs: true });
const model = provider.chatModel(task.model);
const responsesModel = createOpenAI({ baseURL, apiKey: "-" })(task.model);
const limits = { maxOutputTokens: 128, temperature: 0 };

async function sameStreamed(asked) {
  const whole = await generateText(asked);
  let text = "";
  for await (const part of streamText(asked).textStream) text += part;
  assert.ok(text);
  assert.equal(text, whole.text);
  return whole;
}

function weatherTool(asked) {
  const execute = async ({ city }) => (asked.push(city), task.weather);
  const { description, parameters } = task.tool;
  return { get_weather: tool({ description, inputSchema: jsonSchema(parameters), execute }) };
}

async function callsTools(model) {
  const cities = [];
  const asked = { model, prompt: task.weather_question, tools: weatherTool(cities), stopWhen: stepCountIs(3), ...limits };
  const whole = await sameStreamed(asked);
  assert.deepEqual(cities, ["Oslo", "Oslo"]);
  assert.ok(whole.text.includes(task.weather), whole.text);
}

const parts = {
  async completions() {
    await sameStreamed({ model: provider.completionModel(task.model), prompt: task.prompt, ...limits, maxOutputTokens: 16 });
  },

  async chat() {
    await sameStreamed({ model, system: task.system, prompt: task.question, ...limits });
  },

  async thought() {
    const providerOptions = { galaxyline: { reasoningEffort: "high" } };
    const whole = await sameStreamed({ model, prompt: task.question, providerOptions, ...limits });
    assert.ok(whole.reasoningText);
  },

  async tools() {
    await callsTools(model);
  },

  async structured() {
    const schema = jsonSchema(task.city_schema);
    const asked = { model, prompt: task.city_question, ...limits };
    assert.equal((await generateObject({ ...asked, schema })).object.city, "Oslo");
    let streamed;
    for await (const part of streamObject({ ...asked, schema }).partialObjectStream) streamed = part;
    assert.equal(streamed.city, "Oslo");
    assert.equal((await generateText({ ...asked, output: Output.object({ schema }) })).output.city, "Oslo");
  },

  async responses() {
    await sameStreamed({ model: responsesModel, prompt: task.question, ...limits });
  },

  async responses_tools() {
    await callsTools(responsesModel);
  },
};

await parts[process.argv[2]]();
console.log("passed");
