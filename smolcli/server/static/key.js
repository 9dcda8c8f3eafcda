/** The API key, stored only for this tab. One dialog serves all requests that need a key. */

import { $, keep, kept } from "./dom.js";

let pending = null; // promise of the open dialog, if any

/** Ask for a key other than `rejected`. Resolves to whether there is a new key to try. */
export async function askForKey(rejected) {
  if (kept("key", "") !== rejected) return true;
  const why = rejected ? "The server rejected this key." : "The server requires an API key.";
  pending ??= ask(why).finally(() => (pending = null));
  return pending;
}

function ask(why) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  $("key").value = kept("key", "");
  dialog.returnValue = "";
  dialog.showModal();
  $("key").select();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "submitted"), { once: true }),
  );
}

/** Set up the dialog; `onChange` is called when the user sets a key without being asked to. */
export function setUpKey(onChange) {
  $("key-button").addEventListener("click", async () => {
    if (await ask("Sent with every request if the server requires it.")) onChange();
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep("key", $("key").value);
    $("key-dialog").close("submitted");
  });
}
