// The form of a new run: says what is wrong as you type, keeps form and text alike, and asks for the plan.
"use strict";

const form = document.getElementById("new-run");
const { text, base } = form.elements;
const plan = document.getElementById("plan");
let isDirty = false; // something was typed since the form was last sent
let isTouched = false, typing, timing, planned; // isTouched: something was typed that is nowhere else

const send = (url, data, signal) => fetch(url, { method: "POST", body: data, signal }).catch(() => null);

// Puts a value into every control of an option, but not into the one that is being typed in.
function put(name, value) {
  for (const control of form.querySelectorAll(`[name="o.${name}"]`)) {
    if (control.type === "hidden" || control === document.activeElement) continue;
    if (control.type === "checkbox") control.checked = value.split("\n").includes(control.value);
    else control.value = value;
    if (control.selectedIndex === -1) control.add(new Option(value, value, true, true)); // no choice of this name
  }
}

function say(id, words) {
  const line = document.getElementById(id);
  line.textContent = words;
  line.hidden = !words;
}

async function check() {
  isDirty = false;
  const response = await send("/new/check", new FormData(form));
  if (!response?.ok) return say("problem", "The page does not answer. What you typed is still here.");
  const said = await response.json();
  if (isDirty) return; // it was typed on: the next answer has everything
  say("problem", "");
  for (const [name, option] of Object.entries(said.options)) {
    if (said.base === said.text) put(name, option.text);
    form.querySelector(`[data-option="${name}"]`).classList.toggle("changed", option.changed);
    document.getElementById(`o.${name}`).setAttribute("aria-invalid", option.problem !== "");
    say(`o.${name}.problem`, option.problem);
    say(`o.${name}.caution`, option.caution);
  }
  if (text.value !== said.text) text.value = said.text;
  base.value = said.base;
  for (const badge of form.querySelectorAll("[data-count]")) {
    const count = badge.closest("details").querySelectorAll(".changed").length;
    [badge.hidden, badge.textContent] = [!count, `${count} changed`];
  }
  replace(document.getElementById("said"), said.said);
  say("proposed", (form.elements.name.placeholder = said.name));
  said.plan ? ask(false) : planned?.abort();
  plan.setAttribute("aria-busy", "true"); // pale until it is the plan of this recipe
}

// A newer question ends an older one. The time is asked for once nothing has been typed for a while.
async function ask(isTimed) {
  clearTimeout(timing);
  planned?.abort();
  planned = new AbortController();
  const data = new FormData(form);
  if (isTimed) data.set("timed", "1");
  else if (plan.querySelector("[data-nothing]")) plan.firstElementChild.textContent = "planning…";
  const response = await send("/new/plan", data, planned.signal);
  if (response?.status !== 200) return;
  replace(plan, await response.text());
  plan.removeAttribute("aria-busy");
  if (plan.querySelector("[data-time]") && !isTimed) timing = setTimeout(ask, 1500, true);
}

form.addEventListener("input", (event) => {
  if (event.target.id === "filter") return; // it is no part of the recipe
  isDirty = isTouched = true;
  clearTimeout(typing);
  typing = setTimeout(check, 300);
});
form.addEventListener("submit", (event) => {
  if (event.submitter.formAction.endsWith("/new")) check(event.preventDefault());
  else isTouched &&= "stays" in event.submitter.dataset;
});
window.addEventListener("beforeunload", (event) => isTouched && event.preventDefault());

document.getElementById("filter-field").hidden = false;
document.getElementById("filter").addEventListener("input", (event) => {
  const word = event.target.value.trim().toLowerCase();
  for (const fold of form.querySelectorAll("details.fold:has([data-option])")) {
    const boxes = [...fold.querySelectorAll("[data-option]")];
    for (const box of boxes) box.hidden = !`${box.dataset.option} ${box.textContent}`.toLowerCase().includes(word);
    [fold.hidden, fold.open] = [boxes.every((box) => box.hidden), word !== ""];
  }
});
afterPaint(check);
