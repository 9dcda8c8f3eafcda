/**
 * Drives /v1/files and /v1/batches with OpenAI's Node client.
 *
 *     npm install openai
 *     node benchmarks/clients/openai_batches.mjs http://127.0.0.1:8000/v1 [API_KEY]
 *
 * Prints one line for each step, and exits with 1 if one of them fails.
 */

import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { createRequire } from "node:module";

// Relative to the working directory, so that the client may be installed anywhere.
const OpenAI = createRequire(path.join(process.cwd(), "x.js"))("openai").default;

const [baseURL = "http://127.0.0.1:8000/v1", apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const endpoint = "/v1/chat/completions";
const model = (await client.models.list()).data[0].id;
const folder = fs.mkdtempSync(path.join(os.tmpdir(), "batches-"));

function request(id, question, extra = {}) {
  const body = { model, messages: [{ role: "user", content: question }], max_tokens: 16, ...extra };
  return { custom_id: id, method: "POST", url: endpoint, body };
}

async function upload(name, requests) {
  const file = path.join(folder, name);
  fs.writeFileSync(file, requests.map((each) => JSON.stringify(each) + "\n").join(""));
  return client.files.create({ file: fs.createReadStream(file), purpose: "batch" });
}

async function create(file, extra = {}) {
  return client.batches.create({
    input_file_id: file.id, endpoint, completion_window: "24h", ...extra,
  });
}

async function finish(batch) {
  while (["validating", "in_progress", "finalizing", "cancelling"].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

async function lines(id) {
  const text = await (await client.files.content(id)).text();
  return text.trim().split("\n").map((each) => JSON.parse(each));
}

const requests = [
  request("capital", "What is the capital of France?"),
  request("cold", "What is ice?", { temperature: -1 }),
  request("sky", "Why is the sky blue?"),
];
const file = await upload("questions.jsonl", requests);
assert.equal(file.filename, "questions.jsonl");
assert.equal((await client.files.retrieve(file.id)).bytes, file.bytes);
console.log("upload", file.id, file.bytes, "bytes");

const batch = await finish(await create(file, { metadata: { run: "node" } }));
assert.equal(batch.status, "completed");
assert.deepEqual(batch.request_counts, { total: 3, completed: 2, failed: 1 });
assert.deepEqual(batch.metadata, { run: "node" });
for (const each of await lines(batch.output_file_id)) {
  console.log("answer", each.custom_id, JSON.stringify(each.response.body.choices[0].message.content));
}
const [failed] = await lines(batch.error_file_id);
assert.equal(failed.response.status_code, 400);
console.log("failed", failed.custom_id, failed.response.body.error.param);

const invalid = await finish(await create(await upload("invalid.jsonl", [{ custom_id: "x" }])));
assert.equal(invalid.status, "failed");
console.log("invalid", JSON.stringify(invalid.errors.data[0]));

const many = Array.from({ length: 500 }, (_, n) =>
  request(`q${n}`, `Tell me about the number ${n}.`, { max_tokens: 64 }));
const long = await create(await upload("many.jsonl", many));
await client.batches.cancel(long.id);
const cancelled = await finish(long);
assert.equal(cancelled.status, "cancelled");
console.log("cancelled", JSON.stringify(cancelled.request_counts));

const listed = [];
for await (const each of client.batches.list({ limit: 1 })) listed.push(each.id);
assert.deepEqual(listed.slice(0, 3), [long.id, invalid.id, batch.id]);
console.log("list", listed.length, "batches, one a page");

for (const [what, promise, status, param] of [
  ["endpoint", create(file, { endpoint: "/v1/embeddings" }), 400, "endpoint"],
  ["unknown file", create({ id: "file-none" }), 404, "input_file_id"],
  ["purpose", client.files.create({ file: new File(["x"], "x"), purpose: "user_data" }), 400, "purpose"],
]) {
  const error = await promise.then(() => null, (reason) => reason);
  assert.equal(error?.status, status, what);
  assert.equal(error.param, param, what);
  console.log("rejected", what, error.status, error.code);
}

assert.equal((await client.files.delete(file.id)).deleted, true);
await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
console.log("delete", file.id);
fs.rmSync(folder, { recursive: true });
