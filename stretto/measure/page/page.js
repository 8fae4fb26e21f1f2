"use strict";
for (const figure of document.querySelectorAll("[data-curves]")) {
  const svg = figure.querySelector("svg"), readout = figure.querySelector(".readout");
  const { metric, lines } = JSON.parse(figure.querySelector("script").textContent);
  const drawn = lines.map((_, index) => document.getElementById(`${figure.dataset.curves}-run-${index}`));
  const hint = "Point at a line, or use the arrow keys here.";
  const spot = svg.appendChild(document.createElementNS(svg.namespaceURI, "circle"));
  let at = null; // [line, point]
  spot.setAttribute("r", 4);
  spot.style.fill = "var(--ink)";
  const show = place => {
    at = place;
    spot.style.display = at ? "" : "none";
    drawn.forEach((line, index) => line.classList.toggle("dim", at !== null && index !== at[0]));
    if (!at) { readout.textContent = hint; return; }
    const [x, y, step, wall, value] = lines[at[0]].points[at[1]];
    spot.setAttribute("cx", x);
    spot.setAttribute("cy", y);
    const time = wall === null ? "" : `, ${wall < 10 ? wall.toPrecision(2) : Math.round(wall)} s`;
    readout.textContent = `${lines[at[0]].label}: step ${step}${time}, ${metric} ${value}`;
  };
  const near = event => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = 30 ** 2, found = null;
    lines.forEach((line, i) => line.points.forEach(([x, y], j) => {
      const distance = (x - place.x) ** 2 + (y - place.y) ** 2;
      if (distance < best) { best = distance; found = [i, j]; }
    }));
    show(found);
  };
  const move = (lineStep, pointStep) => {
    const some = lines.map((line, index) => index).filter(index => lines[index].points.length);
    if (!some.length) return;
    const line = at ? some[(some.indexOf(at[0]) + lineStep + some.length) % some.length] : some[0];
    const last = lines[line].points.length - 1;
    show([line, Math.min(last, Math.max(0, at ? at[1] + pointStep : last))]);
  };
  const keys = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerdown", near);
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", event => {
    if (event.key === "Escape") show(null);
    if (!(event.key in keys)) return;
    event.preventDefault();
    move(...keys[event.key]);
  });
  show(null);
}
document.documentElement.dataset.fits = document.documentElement.scrollWidth <= innerWidth;
document.documentElement.dataset.ready = true;
