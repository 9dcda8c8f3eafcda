/** The name of the server's model, and the warning that fits its size. */

import { $ } from "./dom.js";
import { request } from "./wire.js";

/** Fetch, show and return the model's name. */
export async function nameModel() {
  const response = await request("v1/models");
  const model = (await response.json()).data[0].id;
  $("model").textContent = model.split("/").at(-1);
  $("model").title = model;
  $("model").dataset.id = model;
  const size = /(?:^|\D)(\d+(?:\.\d+)?[MB])(?![a-z])/i.exec(model)?.[1];
  const warning = size
    ? `A model with ${size} parameters is often wrong.`
    : "Small models are often wrong.";
  for (const hint of document.querySelectorAll(".model-warning")) hint.textContent = warning;
  return model;
}
