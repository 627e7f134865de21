// Filters the answers, a page at a time. Without it the page shows them all.
const PAGE = 24;
const form = document.querySelector("form.filters");
const { reference } = form.dataset;
const cards = [...document.querySelectorAll("#answers > article")];
const texts = cards.map((card) => card.textContent.toLowerCase());
const more = document.getElementById("more");
const tests = {
  any: () => true,
  right: (right, arm) => right[arm] === "1",
  wrong: (right, arm) => right[arm] !== "1",
  unparsed: (right, arm) => right[arm] === "u",
  differs: (right) => right.includes("1") && /[^1]/.test(right),
  won: (right, arm) => right[arm] === "1" && right[reference] !== "1",
  lost: (right, arm) => right[arm] !== "1" && right[reference] === "1",
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

// Where a memory looked, over the question's pictures; not where the model saw them in tiles.
function look(chip, on) {
  const pictures = chip.closest(".card").querySelectorAll(".pictures > *"), maps = chip.dataset.maps.split(" ");
  if (maps.length !== pictures.length) return;
  pictures.forEach((picture, place) => picture.style.setProperty("--look", on ? maps[place] : "none"));
}

for (const chip of document.querySelectorAll("button.chip")) {
  chip.onpointerenter = chip.onfocus = chip.onclick = () => look(chip, true);
  chip.onpointerleave = chip.onblur = () => look(chip, false);
}
