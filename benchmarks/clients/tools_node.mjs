// Drives function calling with unchanged JavaScript clients, and prints what each of them got.
//
//   npm install openai zod ai @ai-sdk/openai-compatible
//   smol serve
//   node benchmarks/clients/tools_node.mjs http://127.0.0.1:8000/v1

import OpenAI from "openai";
import { generateObject, generateText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8000/v1";
const model = "HuggingFaceTB/SmolLM2-135M-Instruct";
const question = "What is the weather in Paris?";
const person = "Who is this? Maria Lopez is 34.";
const client = new OpenAI({ baseURL, apiKey: "none" });
const provider = createOpenAICompatible({ name: "smol", baseURL, supportsStructuredOutputs: true });

const clients = {
  async runTools() {
    const called = [];
    const runner = client.chat.completions.runTools({
      model,
      max_tokens: 100,
      messages: [{ role: "user", content: question }],
      tool_choice: { type: "function", function: { name: "get_weather" } },
      tools: [
        {
          type: "function",
          function: {
            name: "get_weather",
            description: "Weather of a city",
            parameters: {
              type: "object",
              properties: { city: { type: "string" } },
              required: ["city"],
            },
            parse: JSON.parse,
            function: ({ city }) => {
              called.push(city);
              return `18 degrees and sunny in ${city}`;
            },
          },
        },
      ],
    });
    await runner.done();
    return { called };
  },

  async responsesStream() {
    const stream = client.responses.stream({ model, input: "What is the capital of France?" });
    let text = "";
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    const response = await stream.finalResponse();
    return { text, isEqual: text === response.output_text, status: response.status };
  },

  async vercelTools() {
    const result = await generateText({
      model: provider(model),
      prompt: question,
      maxOutputTokens: 100,
      toolChoice: "required",
      tools: {
        get_weather: tool({
          description: "Weather of a city",
          inputSchema: z.object({ city: z.string() }),
          execute: async ({ city }) => `18 degrees and sunny in ${city}`,
        }),
      },
    });
    return result.toolResults.map((each) => each.output);
  },

  async vercelGenerateObject() {
    const schema = z.object({ name: z.string(), age: z.number().int() });
    return (await generateObject({ model: provider(model), prompt: person, schema })).object;
  },
};

let numFailed = 0;
for (const [name, run] of Object.entries(clients)) {
  try {
    console.log(`${name}: ${JSON.stringify(await run())}`);
  } catch (error) {
    numFailed += 1;
    console.log(`${name}: FAILED: ${String(error?.stack ?? error).slice(0, 600)}`);
  }
}
process.exit(numFailed);
