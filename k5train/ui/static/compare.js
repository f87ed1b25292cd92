// Steps behind a slider: <div data-steps> holds one <details data-step="Step 500"> for each step, the last one open.
// Without this script they are opened one by one. A report carries this script in itself.
"use strict";

function slide(steps) {
  const each = [...steps.querySelectorAll("details[data-step]")];
  if (each.length < 2) return;
  const label = document.createElement("label");
  const slider = document.createElement("input");
  const said = document.createElement("output");
  // A live part is replaced when a step comes: who looks at an earlier one goes on looking at it.
  const host = steps.closest("[data-live]") ?? steps;
  const kept = each.findIndex((details) => details.dataset.step === host.dataset.at);
  Object.assign(slider, { type: "range", min: 0, max: each.length - 1, step: 1, value: kept < 0 ? each.length - 1 : kept });
  slider.id = "slider";
  slider.setAttribute("aria-label", "Step of the pictures");
  label.className = "slider";
  label.append(slider, said);
  steps.before(label);
  steps.classList.add("slid");
  const show = () => {
    each.forEach((details, i) => (details.open = i === Number(slider.value)));
    said.textContent = each[slider.value].dataset.step;
    host.dataset.at = Number(slider.value) < each.length - 1 ? said.textContent : "";
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  slider.addEventListener("input", show);
  show();
}

document.querySelectorAll("[data-steps]").forEach(slide);
document.addEventListener("live", (event) => event.target.querySelectorAll("[data-steps]").forEach(slide));

// At most so many boxes can be ticked: <form data-most="12">.
for (const form of document.querySelectorAll("form[data-most]")) {
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const limit = () => {
    const ticked = boxes.filter((box) => box.checked).length;
    for (const box of boxes) box.disabled = !box.checked && ticked >= Number(form.dataset.most);
    for (const button of form.querySelectorAll("button")) button.disabled = ticked < 1;
  };
  form.addEventListener("change", limit);
  limit();
}
