/** The API key: asked for once however many requests lack it, kept in this tab alone. */

import { $, keep, kept } from "./dom.js";

let asked = null;

/** Ask for another key than `refused`; gives whether there is one to try. */
export async function askForKey(refused) {
  if (kept("key", "") !== refused) return true;
  const why = refused ? "The server does not know this key." : "The server asks for a key.";
  asked ??= ask(why).finally(() => (asked = null));
  return asked;
}

function ask(why) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  $("key").value = kept("key", "");
  dialog.returnValue = "";
  dialog.showModal();
  $("key").select();
  return new Promise((answer) =>
    dialog.addEventListener("close", () => answer(dialog.returnValue === "given"), { once: true }),
  );
}

/** `onChange` is called when a key was given by hand, not on a request's demand. */
export function setUpKey(onChange) {
  $("key-button").addEventListener("click", async () => {
    if (await ask("Sent with every request, if the server wants one.")) onChange();
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep("key", $("key").value);
    $("key-dialog").close("given");
  });
}
