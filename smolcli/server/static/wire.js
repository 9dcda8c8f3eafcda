/** Requests that carry the API key, answers read line by line, every fault one kind of error. */

import { askForKey } from "./key.js";
import { kept } from "./dom.js";

export class Fault extends Error {
  constructor(message, { status = 0, code = null, field = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, field, retryAfterS });
  }
}

/** The answer to a request, once it is a good one; asks for a key for as long as the server does. */
export async function request(path, { body, accept = "application/json", signal } = {}) {
  for (;;) {
    const key = kept("key", "");
    const headers = { Accept: accept };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const answer = await reach(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
    if (answer.ok) return answer;
    const fault = await faultOf(answer);
    if (fault.status !== 401 || !(await askForKey(key))) throw fault;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (cause) {
    throw cause.name === "AbortError" ? cause : new Fault("The server cannot be reached.");
  }
}

async function faultOf(answer) {
  const body = await answer.json().catch(() => null);
  const fault = faultIn(body, answer.status) ?? new Fault(`The server answered ${answer.status}.`);
  const retryAfterS = Number(answer.headers.get("Retry-After")) || null;
  return Object.assign(fault, { status: answer.status, retryAfterS });
}

/** The error that an object of ours or of OpenAI's shape reports, or null. */
export function faultIn(body) {
  const error = body?.error;
  if (!error) return null;
  if (typeof error === "string") return new Fault(error, { code: body.error_code, field: body.field });
  return new Fault(String(error.message), { code: error.code ?? error.type, field: error.param });
}

/** The lines of an answer as they arrive; leaving the loop early lets go of the connection. */
export async function* lines(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((cause) => {
        throw cause.name === "AbortError" ? cause : new Fault("The connection was lost.");
      });
      const whole = (rest + decoder.decode(value, { stream: !done })).split("\n");
      rest = done ? "" : whole.pop();
      for (const line of whole) if (line.trim()) yield line.trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The objects of a server-sent event stream, up to its [DONE]. */
export async function* events(answer) {
  for await (const line of lines(answer)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
  throw new Fault("The answer broke off.");
}
