/** Which model the server has, and how far it is to be trusted. */

import { $ } from "./dom.js";
import { request } from "./wire.js";

/** Ask for the model's name and show it; gives the name. */
export async function nameModel() {
  const answer = await request("v1/models");
  const model = (await answer.json()).data[0].id;
  $("model").textContent = model.split("/").at(-1);
  $("model").title = model;
  $("model").dataset.id = model;
  const size = /(?:^|\D)(\d+(?:\.\d+)?[MB])(?![a-z])/i.exec(model)?.[1];
  const honest = size ? `A model of ${size} parameters is often wrong.` : "A small model is often wrong.";
  for (const place of document.querySelectorAll(".honest")) place.textContent = honest;
  return model;
}
