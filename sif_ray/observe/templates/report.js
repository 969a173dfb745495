"use strict";
// Everything here is comfort: without it the page shows the same numbers and pictures.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Name the value under the pointer of a curve.
for (const plot of document.querySelectorAll(".plot[data-hover]")) {
  const data = JSON.parse(plot.dataset.hover);
  const frame = plot.querySelector(".frame");
  const output = plot.querySelector("output");
  const last = output.textContent;
  const rule = element("span", { className: "rule", hidden: true });
  const dot = element("span", { className: "dot", hidden: true });
  frame.append(rule, dot);
  const first = data.steps[0];
  const extent = Math.max(data.steps[data.steps.length - 1] - first, 1);
  frame.addEventListener("pointermove", (event) => {
    const area = frame.getBoundingClientRect();
    const step = first + (extent * (event.clientX - area.left)) / area.width;
    let nearest = 0;
    data.steps.forEach((value, index) => {
      if (Math.abs(value - step) < Math.abs(data.steps[nearest] - step)) nearest = index;
    });
    const left = (100 * (data.steps[nearest] - first)) / extent;
    rule.style.left = dot.style.left = `${left}%`;
    dot.style.bottom = "auto";
    dot.style.top = `${100 - (100 * (data.values[nearest] - data.bottom)) / (data.top - data.bottom)}%`;
    rule.hidden = dot.hidden = false;
    output.textContent = `${data.values[nearest]} at ${data.steps[nearest]}`;
  });
  frame.addEventListener("pointerleave", () => {
    rule.hidden = dot.hidden = true;
    output.textContent = last;
  });
}

// Move and zoom the close-up of the timeline.
const excerpt = document.querySelector(".excerpt");
if (excerpt) {
  const total = Number(excerpt.dataset.total);
  let seconds = Number(excerpt.dataset.window);
  const slider = element("input", { type: "range", min: 0, max: 1000, ariaLabel: "start of the close-up" });
  slider.value = total > seconds ? (1000 * Number(excerpt.dataset.start)) / (total - seconds) : 0;
  const told = element("span");
  const scale = excerpt.querySelector(".scale div");
  const draw = () => {
    const start = ((total - seconds) * slider.value) / 1000;
    for (const svg of excerpt.querySelectorAll("svg")) svg.setAttribute("viewBox", `${start} 0 ${seconds} 1`);
    told.textContent = `${start.toFixed(1)} to ${(start + seconds).toFixed(1)} s`;
    const step = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((size) => seconds / size <= 7) || 5000;
    scale.replaceChildren();
    for (let at = Math.ceil(start / step) * step; at <= start + seconds; at += step) {
      const tick = element("i", {}, element("span", { textContent: `${+at.toFixed(1)} s` }));
      tick.style.left = `${(100 * (at - start)) / seconds}%`;
      scale.append(tick);
    }
  };
  const windows = [10, 30, 120].filter((size) => size < total).concat([total]);
  const buttons = windows.map((size) => {
    const button = element("button", { type: "button", textContent: size === total ? "whole run" : `${size} s` });
    button.addEventListener("click", () => {
      seconds = size;
      for (const other of buttons) other.ariaPressed = String(other === button);
      draw();
    });
    button.ariaPressed = String(size === seconds);
    return button;
  });
  slider.addEventListener("input", draw);
  excerpt.before(element("div", { className: "tools" }, ...buttons, slider, told));
  draw();
}

// Step through an example at full size.
for (const example of document.querySelectorAll(".example")) {
  const looks = [...example.querySelectorAll(".looks li")];
  example.classList.add("can-open");
  looks.forEach((look, index) => {
    for (const picture of look.querySelectorAll(".picture")) picture.addEventListener("click", () => open(index));
  });
  const opener = element("button", { type: "button", textContent: "step through" });
  opener.addEventListener("click", () => open(0));
  example.querySelector("header").append(opener);
  const open = (start) => {
    let current = start;
    const title = element("h3", { textContent: example.querySelector("h3").textContent });
    const name = element("h4");
    const pair = element("div", { className: "pair" });
    const words = element("p");
    const show = (index) => {
      current = Math.min(Math.max(index, 0), looks.length - 1);
      const look = looks[current];
      name.textContent = `${current + 1} of ${looks.length}: ${look.querySelector("h4").lastChild.textContent}`;
      pair.replaceChildren(...[...look.querySelectorAll(".picture")].map((picture) => picture.cloneNode(true)));
      const depths = [...look.querySelectorAll(".depths span")].map((depth) => depth.textContent.trim());
      words.textContent = `${look.querySelector(".words").textContent} (${depths.join("; ")})`;
      back.disabled = current === 0;
      next.disabled = current === looks.length - 1;
    };
    const button = (text, act, className = "") => {
      const made = element("button", { type: "button", textContent: text, className });
      made.addEventListener("click", act);
      return made;
    };
    const back = button("← back", () => show(current - 1));
    const next = button("next →", () => show(current + 1));
    const dialog = element("dialog", {}, title, name, pair, words);
    dialog.append(element("nav", {}, back, next, button("close", () => dialog.close(), "close")));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") show(current - 1);
      if (event.key === "ArrowRight") show(current + 1);
    });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    show(start);
    dialog.showModal();
    next.focus();
  };
}
