/** Rows made from lines, and how they are answered: in chunks, as results come, nothing lost. */

import { Fault, faultIn, lines, request } from "./wire.js";

const CHUNK_ROWS = 100;
const CHUNK_CHARS = 200_000;
const CHUNKS_AT_ONCE = 2; // the second keeps the engine busy while the first one's last answers end
const TRY_AGAIN_S = 2;
const PASSING = new Set(["timeout", "cancelled", "overloaded", "backend_error"]);

/** One row for each line that is not blank; one that is not JSON is an error from the start. */
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

/** Whether `row` is still to be answered; a fault of the moment is worth another try. */
export const isPending = (row) => row.result === null || PASSING.has(row.result.error_code);

/** A number that a double cannot carry to the letter stays the text it was. */
function exact(_, value, context) {
  const source = typeof value === "number" ? context?.source : undefined;
  return source && source !== String(value) && JSON.rawJSON ? JSON.rawJSON(source) : value;
}

/** Take the next chunk off the queue: so many rows, so much text, one row at least. */
function take(queue) {
  let [count, chars] = [0, 0];
  while (count < Math.min(queue.length, CHUNK_ROWS) && (count === 0 || chars < CHUNK_CHARS)) {
    chars += queue[count++].text.length;
  }
  return queue.splice(0, count);
}

/** Answers queries: `settle(row, result)` for each, `trouble(text)` for what holds all of them up. */
export class Asker {
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
    } catch (fault) {
      if (fault.status === 503) {
        await this.#pause(fault);
        return this.#ask(chunk);
      }
      if (fault.status !== 400 && fault.status !== 413) throw fault;
      if (chunk.length === 1) return this.#blame(chunk[0], fault);
      const half = chunk.length >> 1;
      await this.#ask(chunk.slice(0, half));
      await this.#ask(chunk.slice(half));
    }
  }

  /** The rows travel as they were written, so that no number and no key is changed on the way. */
  async #receive(chunk) {
    const body = `{"queries":[${chunk.map((row) => row.text).join(",\n")}]}`;
    const options = { body, accept: "application/x-ndjson", signal: this.signal };
    const answer = await request("chat/batched", options);
    this.trouble("");
    for await (const line of lines(answer)) {
      const { index, ...result } = JSON.parse(line, exact);
      if (!chunk[index]) throw faultIn(result) ?? new Fault("The server answered out of turn.");
      this.settle(chunk[index], result);
    }
    if (chunk.some((row) => row.result === null)) throw new Fault("The connection was lost.");
  }

  #blame(row, { message: error, code: error_code, field }) {
    this.settle(row, { chat_id: null, error, error_code, ...(field && { field }) });
  }

  #pause(fault) {
    const waitS = fault.retryAfterS ?? TRY_AGAIN_S;
    this.trouble(`${fault.message} Trying again in ${waitS} s.`);
    return new Promise((go, stop) => {
      const timer = setTimeout(go, waitS * 1000);
      this.signal.addEventListener("abort", () => {
        clearTimeout(timer);
        stop(this.signal.reason);
      });
    });
  }
}
