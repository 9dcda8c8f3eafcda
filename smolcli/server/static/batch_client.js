/** Parses the lines of a batch into rows, and sends them to the server in chunks. */

import { RequestError, errorIn, lines, request } from "./wire.js";

const CHUNK_ROWS = 100;
const CHUNK_CHARS = 200_000;
const CHUNKS_AT_ONCE = 2; // keeps the engine busy while the last answers of a chunk finish
const RETRY_AFTER_S = 2;
const TRANSIENT = new Set(["timeout", "cancelled", "overloaded", "backend_error"]);

/** One row per non-blank line. A line that is not valid JSON gets its error right away. */
export function parse(text) {
  return text.split("\n").flatMap((raw, at) => {
    const [line, trimmed] = [at + 1, raw.trim()];
    if (!trimmed) return [];
    try {
      return [{ line, text: trimmed, query: JSON.parse(trimmed), result: null, view: null }];
    } catch (cause) {
      const result = { chat_id: null, error: `invalid JSON: ${cause.message}`, error_code: "invalid_json" };
      return [{ line, text: trimmed, query: null, result, view: null }];
    }
  });
}

/** Whether `row` has no answer yet; transient errors are worth retrying. */
export const isPending = (row) => row.result === null || TRANSIENT.has(row.result.error_code);

/** JSON.parse reviver that keeps numbers a double cannot represent exactly as they were written. */
function exact(_, value, context) {
  const source = typeof value === "number" ? context?.source : undefined;
  return source && source !== String(value) && JSON.rawJSON ? JSON.rawJSON(source) : value;
}

/** Remove the next chunk from the queue: at least one row, within the limits above. */
function take(queue) {
  let [count, chars] = [0, 0];
  while (count < Math.min(queue.length, CHUNK_ROWS) && (count === 0 || chars < CHUNK_CHARS)) {
    chars += queue[count++].text.length;
  }
  return queue.splice(0, count);
}

/** Sends rows to the server.
 *
 * Calls `settle(row, result)` for each result and `trouble(text)` when the whole batch is delayed.
 */
export class BatchClient {
  constructor(settle, trouble, signal) {
    Object.assign(this, { settle, trouble, signal });
  }

  async answer(queue) {
    const work = async () => {
      while (queue.length) await this.#ask(take(queue));
    };
    await Promise.all(Array.from({ length: CHUNKS_AT_ONCE }, work));
  }

  async #ask(chunk) {
    try {
      await this.#receive(chunk);
    } catch (error) {
      if (error.status === 503) {
        await this.#pause(error);
        return this.#ask(chunk);
      }
      if (error.status !== 400 && error.status !== 413) throw error;
      if (chunk.length === 1) return this.#blame(chunk[0], error);
      const half = chunk.length >> 1;
      await this.#ask(chunk.slice(0, half));
      await this.#ask(chunk.slice(half));
    }
  }

  /** Sends rows exactly as they were written, so that no number or key changes on the way. */
  async #receive(chunk) {
    const body = `{"queries":[${chunk.map((row) => row.text).join(",\n")}]}`;
    const options = { body, accept: "application/x-ndjson", signal: this.signal };
    const response = await request("chat/batched", options);
    this.trouble("");
    for await (const line of lines(response)) {
      const { index, ...result } = JSON.parse(line, exact);
      if (!chunk[index]) throw errorIn(result) ?? new RequestError("The server sent an unexpected result.");
      this.settle(chunk[index], result);
    }
    if (chunk.some((row) => row.result === null)) throw new RequestError("The connection was lost.");
  }

  #blame(row, { message: error, code: error_code, field }) {
    this.settle(row, { chat_id: null, error, error_code, ...(field && { field }) });
  }

  #pause(error) {
    const waitS = error.retryAfterS ?? RETRY_AFTER_S;
    this.trouble(`${error.message} Retrying in ${waitS} s.`);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, waitS * 1000);
      this.signal.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(this.signal.reason);
      });
    });
  }
}
