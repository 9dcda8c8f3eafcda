/** DOM helpers. Untrusted text enters the document only through textContent and Text nodes. */

export const $ = (id) => document.getElementById(id);

export const stamp = (template) => $(template).content.firstElementChild.cloneNode(true);

export const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

/** Announce text to screen readers. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Focus another element if `element`, which is about to disappear, contains the focus. */
export function passFocus(element, to) {
  if (element.contains(document.activeElement)) to.focus();
}

/** Store a value until the tab is closed. */
export function keep(name, value) {
  try {
    sessionStorage.setItem(`smol.${name}`, JSON.stringify(value));
  } catch {
    /* storage is full or disabled; the page works without it */
  }
}

/** The stored value, or `fallback` if there is none. */
export function kept(name, fallback) {
  try {
    return JSON.parse(sessionStorage.getItem(`smol.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Copy text, even without the clipboard API, which requires HTTPS or localhost. */
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
