"use strict";

// Makes the pictures of every layer and step one picture to walk through, unit by unit.

const SVG = "http://www.w3.org/2000/svg";
const NUM_COLOURS = 8; // of the style sheet's --k0, --k1, …

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function select(label, options) {
  const chosen = element("select", {}, ...options.map(([text, value]) => element("option", { value }, text)));
  return [element("label", {}, element("span", {}, label), chosen), chosen];
}

const number = (value, digits = 2) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");

class Explorer {
  constructor(root) {
    this.layers = JSON.parse(root.querySelector("script").textContent);
    this.parts = [...root.querySelectorAll(".layer")];
    this.name = root.dataset.name; // the run's
    root.classList.add("live");

    this.controls = element("div", { class: "controls" });
    this.panel = this.makePanel();
    this.stage = element("div", { class: "stage" }, ...this.parts, this.panel);
    root.append(this.controls, this.stage);
    const [layerLabel, layerChoice] = select(
      "Layer", this.layers.map((layer, i) => [layer.name.replace("layer", "Layer "), i]));
    layerChoice.addEventListener("change", () => this.showLayer(Number(layerChoice.value)));
    if (this.layers.length > 1) this.controls.append(layerLabel);
    this.showLayer(0); // and its last step; this.place is that of the unit shown, among the tiles
  }

  get data() { return this.layers[this.layer]; }
  get figures() { return this.data.steps[this.step]; }
  get sheet() { return this.parts[this.layer].querySelectorAll("figure")[this.step]; }

  makePanel() {
    this.heading = element("h3");
    this.field = element("canvas", { class: "field", role: "img" });
    this.map = drawing("svg", { class: "map", role: "img" });
    this.facts = element("dl", { class: "facts" });
    this.film = element("div", { class: "film", "aria-hidden": "true" }); // the choice of step says it all
    const pictures = element("div", { class: "pictures" },
      element("figure", {}, this.field, element("figcaption", {}, "Receptive field")),
      element("figure", {}, this.map, element("figcaption", {}, "Its place and reach; the others coloured by kernel")));
    return element("section", { class: "unit", "aria-label": `The unit shown of ${this.name}` },
      this.heading, pictures, this.facts, this.film);
  }

  showLayer(layer) {
    this.layer = layer;
    this.parts.forEach((part, i) => { part.hidden = i !== layer; });
    const { steps, units, columns } = this.data;
    this.step = steps.length - 1;
    const middle = Math.floor(units.length / columns / 2) * columns + Math.floor(columns / 2);
    this.place = Math.min(middle, units.length - 1);

    const [stepLabel, stepChoice] = select("Step", steps.map((step, i) => [step.title, i]));
    stepChoice.value = this.step;
    stepChoice.addEventListener("change", () => this.showStep(Number(stepChoice.value)));
    const [markLabel, markChoice] = select("Highlight", this.groups());
    markChoice.addEventListener("change", () => this.highlight(markChoice.value));
    this.controls.querySelectorAll(".of-layer").forEach((old) => old.remove());
    for (const label of [stepLabel, markLabel]) label.classList.add("of-layer");
    this.controls.append(stepLabel, markLabel);

    this.makeCells();
    this.showStep(this.step);
  }

  // What a unit was found to be, by the end of the run.
  group(i) {
    const { found, steps } = this.data;
    if (!found.kernel) return "not analysed";
    if (found.kernel[i] >= 0) return `kernel ${found.kernel[i]}`;
    return steps[steps.length - 1].alive[i] ? "left over" : "dead";
  }

  groups() {
    const sizes = new Map();
    this.data.units.forEach((_, i) => sizes.set(this.group(i), (sizes.get(this.group(i)) ?? 0) + 1));
    const names = [...sizes.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    return [["all units", ""], ...names.map((name) => [`${name} (${sizes.get(name)})`, name])];
  }

  highlight(group) {
    this.cells.forEach((cell, i) => cell.classList.toggle("faint", group !== "" && this.group(i) !== group));
  }

  makeCells() {
    const { columns, units } = this.data;
    this.cells = units.map((_, i) => element("div", { role: "gridcell", tabindex: "-1" }));
    this.grid = element("div", { class: "cells", role: "grid" });
    this.grid.style.setProperty("--columns", columns);
    this.grid.style.setProperty("--rows", Math.ceil(units.length / columns));
    for (let i = 0; i < units.length; i += columns) {
      this.grid.append(element("div", { role: "row" }, ...this.cells.slice(i, i + columns)));
    }
    this.cells.forEach((cell, i) => {
      cell.addEventListener("pointerenter", () => this.showUnit(i));
      cell.addEventListener("focus", () => this.showUnit(i));
      cell.addEventListener("click", () => cell.focus());
    });
    this.grid.addEventListener("keydown", (event) => this.walk(event));
  }

  walk(event) {
    const { columns, units } = this.data;
    const last = units.length - 1;
    const first = this.place - (this.place % columns); // of the row
    const whole = event.ctrlKey || event.metaKey;
    const to = {
      ArrowRight: this.place + 1,
      ArrowLeft: this.place - 1,
      ArrowDown: this.place + columns,
      ArrowUp: this.place - columns,
      Home: whole ? 0 : first,
      End: whole ? last : Math.min(first + columns - 1, last),
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to <= last) this.cells[to].focus();
  }

  showStep(step) {
    this.step = step;
    this.parts[this.layer].querySelectorAll("figure").forEach((figure, i) => { figure.hidden = i !== step; });
    this.sheet.querySelector(".tiles").append(this.grid);
    this.grid.setAttribute("aria-label",
      `Units of ${this.data.name} of ${this.name}, ${this.figures.title}; arrow keys walk through them`);
    this.cells.forEach((cell, i) => cell.setAttribute("aria-label", this.describe(i)));
    this.drawPlaces();
    this.showUnit(this.place);
  }

  describe(i) {
    const group = this.group(i);
    const known = group === "not analysed" ? "" : `, ${group}`;
    const { found } = this.data;
    const r2 = found.r2?.[i] === undefined || found.r2[i] === null ? "" : `, R² ${number(found.r2[i])}`;
    const { alive, y, x, radius } = this.figures;
    const where = alive[i] ? `, row ${y[i]}, column ${x[i]}, radius ${number(radius[i])}` : ", all weights zero";
    return `unit ${this.data.units[i]}${known}${where}${r2}`;
  }

  drawPlaces() {
    const { height, width, units, found } = this.data;
    const { alive, y, x } = this.figures;
    this.map.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const dots = units.map((_, i) => {
      const kernel = found.kernel?.[i] ?? -1;
      const dot = drawing("circle", { cx: x[i] + 0.5, cy: y[i] + 0.5, r: 0.018 * Math.max(height, width) });
      dot.style.fill = kernel >= 0 ? `var(--k${kernel % NUM_COLOURS})` : "var(--muted)";
      return alive[i] ? dot : "";
    });
    this.reach = drawing("circle", { class: "reach" });
    this.across = drawing("path", { class: "cross" });
    this.map.replaceChildren(...dots, this.across, this.reach);
  }

  showUnit(i) {
    this.cells[this.place].tabIndex = -1;
    this.cells[this.place].removeAttribute("aria-selected");
    this.place = i;
    this.cells[i].tabIndex = 0;
    this.cells[i].setAttribute("aria-selected", "true");

    const { height, width, units } = this.data;
    const { alive, y, x, radius, title } = this.figures;
    this.heading.textContent = `Unit ${units[i]}, ${title}`;
    this.draw(this.field, this.sheet);
    this.field.setAttribute("aria-label", `Receptive field of unit ${units[i]}, ${title}`);
    this.map.setAttribute("aria-label", alive[i]
      ? `Unit ${units[i]} looks at row ${y[i]}, column ${x[i]} of a grid of ${height} by ${width}`
      : `Unit ${units[i]} looks nowhere`);
    const [cx, cy] = [x[i] + 0.5, y[i] + 0.5];
    this.across.setAttribute("d", alive[i] ? `M${cx} 0V${height}M0 ${cy}H${width}` : "");
    this.reach.setAttribute("r", alive[i] ? Math.max(radius[i], 0.5) : 0);
    this.reach.setAttribute("cx", cx);
    this.reach.setAttribute("cy", cy);
    this.tell(i);
    this.showFilm();
  }

  // The tile of the unit shown, from one sheet.
  draw(canvas, figure) {
    const [height, width] = this.data.tile;
    const picture = figure.querySelector("img");
    const column = this.place % this.data.columns;
    const row = Math.floor(this.place / this.data.columns);
    canvas.width = width;
    canvas.height = height;
    canvas.classList.toggle("diverging", picture.classList.contains("diverging"));
    canvas.getContext("2d").drawImage(
      picture, column * (width + 1), row * (height + 1), width, height, 0, 0, width, height);
  }

  tell(i) {
    const { found, name } = this.data;
    const { alive, y, x, radius, participation, zero, largest } = this.figures;
    const unit = name === "layer1" ? " px" : " places";
    const rows = alive[i]
      ? [["centre", `row ${y[i]}, column ${x[i]}`], ["radius", number(radius[i]) + unit],
         ["participation", number(participation[i], 1)]]
      : [["centre", "none: all weights are zero"]];
    rows.push(["exactly zero", `${number(100 * zero[i], 1)} %`], ["largest weight", number(largest[i], 3)]);
    if (found.kernel) {
      rows.push(["in the end", this.group(i)]);
      if (found.kernel[i] >= 0 && found.gain) rows.push(["gain", number(found.gain[i])]);
      if (found.correlation) rows.push(["correlation", number(found.correlation[i])]);
      if (found.r2) rows.push(["R²", number(found.r2[i])]);
    }
    this.facts.replaceChildren(
      ...rows.flatMap(([what, value]) => [element("dt", {}, what), element("dd", {}, value)]));
  }

  // The same unit at every step.
  showFilm() {
    const figures = [...this.parts[this.layer].querySelectorAll(".sheets > figure")];
    if (this.film.children.length !== figures.length || this.film.dataset.layer !== String(this.layer)) {
      this.film.dataset.layer = this.layer;
      this.film.replaceChildren(...this.data.steps.map((step) => element("figure", {},
        element("canvas"), element("figcaption", {}, step.title))));
    }
    figures.forEach((figure, s) => {
      this.draw(this.film.children[s].querySelector("canvas"), figure);
      this.film.children[s].classList.toggle("now", s === this.step);
    });
  }
}

const explorers = [...document.querySelectorAll(".explorer")];
const pictures = explorers.flatMap((root) => [...root.querySelectorAll("img")]);
Promise.allSettled(pictures.map((picture) => picture.decode())).then(() => {
  for (const root of explorers) new Explorer(root);
  document.documentElement.dataset.ready = "true"; // for those who wait
});
