// Shows what a point of a chart, or a memory in an answer, says of itself: at the pointer, the keyboard or a tap.
"use strict";
const NEAR = 24; // pixels from a point of a chart
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);

function pointed({ target, clientX, clientY }) {
  const own = target.closest("[data-tip]"), chart = target.closest("svg");
  if (own || !chart) return own;
  const points = [...chart.querySelectorAll("[data-tip]")].map((point) => {
    const { left, top, width, height } = point.getBoundingClientRect();
    return { point, away: Math.hypot(clientX - left - width / 2, clientY - top - height / 2) };
  });
  return points.filter(({ away }) => away < NEAR).sort((a, b) => a.away - b.away)[0]?.point;
}

function tell(event) {
  const about = event.target.closest && pointed(event);
  tip.hidden = !about;
  if (!about) return;
  tip.textContent = about.dataset.tip;
  const { left, top, bottom, width } = about.getBoundingClientRect();
  const last = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(left + (width - tip.offsetWidth) / 2, last))}px`;
  tip.style.top = `${top > tip.offsetHeight + 12 ? top - tip.offsetHeight - 6 : bottom + 6}px`;
}

for (const event of ["pointermove", "pointerdown", "focusin"]) document.addEventListener(event, tell);
document.addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });
document.addEventListener("keydown", ({ key }) => { if (key === "Escape") tip.hidden = true; });
