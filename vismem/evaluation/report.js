// Filters the answers, a page at a time. Without it the page shows them all.
"use strict";
const PAGE = 24;
const form = document.querySelector("form.filters");
const { vanilla } = form.dataset;
const cards = [...document.querySelectorAll("#answers > article")];
const texts = cards.map((card) => card.textContent.toLowerCase());
const more = document.getElementById("more");
const tests = {
  any: () => true,
  right: (right, arm) => right[arm] === "1",
  wrong: (right, arm) => right[arm] === "0",
  differs: (right) => right.includes("0") && right.includes("1"),
  won: (right, arm) => right[arm] === "1" && right[vanilla] === "0",
  lost: (right, arm) => right[arm] === "0" && right[vanilla] === "1",
};

function show(limit) {
  const { task, arm, verdict, memory, text } = form.elements;
  const words = text.value.toLowerCase().trim();
  let found = 0;
  cards.forEach((card, place) => {
    const used = card.dataset.memory[arm.value];
    const fits = (!task.value || card.dataset.task === task.value)
      && tests[verdict.value](card.dataset.right, arm.value)
      && (!memory.value || used === memory.value || (used === "b" && memory.value !== "n"))
      && texts[place].includes(words);
    card.hidden = !fits || found >= limit;
    found += fits ? 1 : 0;
  });
  const shown = Math.min(found, limit);
  document.getElementById("found").textContent = `${found} of ${cards.length} questions${shown < found ? `, the first ${shown} shown` : ""}`;
  more.hidden = shown === found;
  more.onclick = () => show(limit + PAGE);
}

form.hidden = false;
form.addEventListener("input", () => show(PAGE));
form.addEventListener("submit", (event) => event.preventDefault());
show(PAGE);
