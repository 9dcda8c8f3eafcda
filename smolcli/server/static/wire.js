/** HTTP requests with the API key, streamed responses, and errors as `RequestError`s. */

import { askForKey } from "./key.js";
import { kept } from "./dom.js";

export class RequestError extends Error {
  constructor(message, { status = 0, code = null, field = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, field, retryAfterS });
  }
}

/** Send a request and return its successful response. Asks for an API key whenever the server does. */
export async function request(path, { body, accept = "application/json", signal } = {}) {
  for (;;) {
    const key = kept("key", "");
    const headers = { Accept: accept };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await reach(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401 || !(await askForKey(key))) throw error;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (cause) {
    throw cause.name === "AbortError" ? cause : new RequestError("The server cannot be reached.");
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const error = errorIn(body, response.status) ?? new RequestError(`The server responded with status ${response.status}.`);
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  return Object.assign(error, { status: response.status, retryAfterS });
}

/** The error in a body of smol's or OpenAI's shape, null if there is none. */
export function errorIn(body) {
  const error = body?.error;
  if (!error) return null;
  if (typeof error === "string") return new RequestError(error, { code: body.error_code, field: body.field });
  return new RequestError(String(error.message), { code: error.code ?? error.type, field: error.param });
}

/** The non-blank lines of a response as they arrive. Leaving the loop closes the connection. */
export async function* lines(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((cause) => {
        throw cause.name === "AbortError" ? cause : new RequestError("The connection was lost.");
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

/** The objects of a server-sent event stream, up to [DONE]. */
export async function* events(response) {
  for await (const line of lines(response)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
  throw new RequestError("The answer was cut off.");
}
