// Data: pictures that are dropped, keys in the grid and between pictures, and captions that are saved in place.
"use strict";

// Dropping files anywhere on the page is choosing them in its form, which is then sent like any other.
const drop = document.querySelector("[data-drop]");
if (drop) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (is) => document.body.classList.toggle("dropping", is);
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget || mark(false));
  addEventListener("drop", (event) => {
    mark(false);
    if (!hasFiles(event) || !event.dataTransfer.files.length) return;
    event.preventDefault();
    drop.querySelector("[type=file]").files = event.dataTransfer.files;
    drop.requestSubmit();
  });
}

// Left, right, up and down go from tile to tile; on the page of one picture, left and right go to its neighbours.
const isTyping = (target) => target.closest("input, textarea, select, [contenteditable]");

function moved(links, from, key) {
  if (key === "ArrowLeft") return links[from - 1];
  if (key === "ArrowRight") return links[from + 1];
  const box = links[from].getBoundingClientRect();
  const down = key === "ArrowDown";
  const near = (link) => {
    const other = link.getBoundingClientRect();
    return down === other.top > box.top && other.top !== box.top ? Math.abs(other.left - box.left) + 4 * Math.abs(other.top - box.top) : Infinity;
  };
  const best = links.reduce((least, link) => (near(link) < near(least) ? link : least));
  return near(best) < Infinity ? best : null;
}

addEventListener("keydown", (event) => {
  if (!event.key.startsWith("Arrow") || event.ctrlKey || event.altKey || event.metaKey || isTyping(event.target)) return;
  const links = [...document.querySelectorAll("[data-grid] .tile > a")];
  const from = links.indexOf(document.activeElement);
  if (from >= 0) {
    const link = moved(links, from, event.key);
    if (link) event.preventDefault();
    link?.focus();
  } else if (document.querySelector(".item-pictures") && !event.key.endsWith("Up") && !event.key.endsWith("Down")) {
    document.querySelector(`[rel=${event.key === "ArrowLeft" ? "prev" : "next"}]`)?.click();
  }
});

// A caption is saved without leaving its place. The answer is the page itself, of which the parts that a caption changes
// are taken: whether the picture is left out, the editor, and the captions as they would be encoded.
const PARTS = ["item-head", "caption-card", "item-captions"];
const editor = () => document.querySelector("[data-caption] textarea");
const isUnsaved = () => Boolean(editor()) && (editor().value !== editor().defaultValue || "changed" in editor().dataset);
addEventListener("beforeunload", (event) => isUnsaved() && event.preventDefault());

addEventListener("input", (event) => {
  const state = document.getElementById("caption-state");
  if (event.target === editor() && state) state.textContent = isUnsaved() ? "Not saved yet" : "";
});

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === editor()) event.target.form.requestSubmit();
});

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("[data-caption]")) return;
  event.preventDefault();
  const { selectionStart, selectionEnd } = editor();
  const state = document.getElementById("caption-state");
  try {
    const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    const now = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!now.getElementById("caption-card")) throw new Error();
    PARTS.forEach((id) => document.getElementById(id)?.replaceWith(now.getElementById(id) ?? ""));
    editor()?.focus({ preventScroll: true });
    editor()?.setSelectionRange(selectionStart, selectionEnd);
    if (answer.ok) document.getElementById("caption-state").textContent = "Saved";
  } catch {
    state.textContent = "It could not be sent: the page does not answer. What you typed is still here.";
  }
});
