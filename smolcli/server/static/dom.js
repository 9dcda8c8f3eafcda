/** Small tools for the page. Text reaches the document through textContent and Text nodes only. */

export const $ = (id) => document.getElementById(id);

export const stamp = (template) => $(template).content.firstElementChild.cloneNode(true);

export const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

/** Tell a screen reader, once. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Keep a value for as long as this tab is open; a full or forbidden store is no reason to stop. */
export function keep(name, value) {
  try {
    sessionStorage.setItem(`smol.${name}`, JSON.stringify(value));
  } catch {
    /* the page works without memory */
  }
}

export function kept(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(`smol.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Copy text, also where the page is not served by https or localhost and has no clipboard API. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (!isDone) throw new Error("the browser did not allow copying");
}
