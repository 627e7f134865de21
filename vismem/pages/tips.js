// Shows what a point of a chart, or a memory in an answer, says of itself: at the pointer, the keyboard or a tap.
"use strict";
const NEAR = 24; // pixels from a point of a chart
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);

const middle = ({ left, top, width, height }) => [left + width / 2, top + height / 2];
const apart = ([x, y], [z, w]) => Math.hypot(x - z, y - w);

// The element pointed at; in a chart also the nearest, and all that lie on it.
function pointed({ target, clientX, clientY }) {
  const own = target.closest("[data-tip]"), chart = target.closest("svg");
  if (!chart) return own ? [own] : [];
  const points = [...chart.querySelectorAll("[data-tip]")].map((point) => [point, middle(point.getBoundingClientRect())]);
  const away = ([, place]) => apart(place, [clientX, clientY]);
  const first = points.find(([point]) => point === own) ?? points.sort((a, b) => away(a) - away(b))[0];
  if (!first || (!own && away(first) > NEAR)) return [];
  return [first, ...points.filter((point) => point !== first && apart(point[1], first[1]) < 4)].map(([point]) => point);
}

function tell(event) {
  const found = event.target.closest ? pointed(event) : [];
  tip.hidden = !found.length;
  if (!found.length) return;
  tip.textContent = found.map((point) => point.dataset.tip).join("\n");
  const { left, top, bottom, width } = found[0].getBoundingClientRect();
  const last = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(left + (width - tip.offsetWidth) / 2, last))}px`;
  tip.style.top = `${top > tip.offsetHeight + 12 ? top - tip.offsetHeight - 6 : bottom + 6}px`;
}

for (const event of ["pointermove", "pointerdown", "focusin"]) document.addEventListener(event, tell);
document.addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });
document.addEventListener("keydown", ({ key }) => { if (key === "Escape") tip.hidden = true; });
