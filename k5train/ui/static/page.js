// What every page does: live parts, buttons that copy, questions before an action, and keys.
"use strict";

// Live parts: <div id="loss" data-live="/runs/ID/events">. The server sends an event with the name of each element
// whose content has changed. A browser allows six connections to a host, so a tab that is hidden has none.
const sources = new Map();

// What the server has to work for waits until the page is painted. A hidden tab is not painted, and asks for nothing.
const afterPaint = (then) => requestAnimationFrame(() => setTimeout(then));

function listen() {
  for (const element of document.querySelectorAll("[data-live]")) {
    const url = element.dataset.live;
    if (!sources.has(url)) {
      const source = new EventSource(url);
      source.addEventListener("problem", (event) => replace(document.getElementById("problem"), event.data));
      source.addEventListener("end", () => source.close());
      sources.set(url, { source, ids: new Set() });
    }
    const { source, ids } = sources.get(url);
    if (!ids.has(element.id)) {
      ids.add(element.id);
      source.addEventListener(element.id, (event) => replace(document.getElementById(element.id), event.data));
    }
  }
}

function hush() {
  for (const { source } of sources.values()) source.close();
  sources.clear();
}

// Puts new HTML into an element; what was open, and the focus, stay. Other scripts hear of it by the event "live".
function replace(element, html) {
  if (!element) return;
  const parsed = document.createElement("template");
  parsed.innerHTML = html;
  if (parsed.innerHTML === element.innerHTML) return; // a stream begins with what the page has already
  const focused = element.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...element.querySelectorAll("details[open][id]")].map((details) => details.id);
  element.replaceChildren(parsed.content);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  element.dispatchEvent(new CustomEvent("live", { bubbles: true }));
}

document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
window.addEventListener("pagehide", hush);
window.addEventListener("pageshow", () => afterPaint(() => document.hidden || listen()));

// <button data-copy="ID"> copies the text of the element with that id.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  const text = source.value ?? source.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not allowed, as over http from another machine: the text is selected, for the user's own keys.
    source.select ? source.select() : getSelection().selectAllChildren(source);
    return;
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
});

// <form data-confirm="Really?"> asks before it is sent, and a double click does not send a form twice.
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) return event.preventDefault();
  if (form.method !== "post" || event.defaultPrevented) return;
  const buttons = [...form.querySelectorAll("button:not([disabled])")];
  const disable = (is) => buttons.forEach((button) => (button.disabled = is));
  setTimeout(disable, 0, true); // not at once: the button that was pressed is sent with the form
  setTimeout(disable, 3000, false);
});
