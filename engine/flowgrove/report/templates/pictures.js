// The sample grids of a run: a slider over its evaluations, and its first beside its last model on the same seeds.
(function () {
"use strict";

const page = (window.flowgrove = window.flowgrove || {});
const addresses = new Map();

page.make = function (tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) found.setAttribute(name, value);
  }
  found.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return found;
};
const make = page.make;

// A short address for a long one, as every tile names it.
function address(src) {
  if (!src.startsWith("data:")) return src;
  if (!addresses.has(src)) {
    const [head, body] = [src.slice(5, src.indexOf(";")), src.slice(src.indexOf(",") + 1)];
    const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
    addresses.set(src, URL.createObjectURL(new Blob([bytes], { type: head })));
  }
  return addresses.get(src);
}

const rowsOf = (grid, rows) => make("div", { class: Math.max(grid.width, grid.height) <= 64 ? "rows" : "rows large" }, rows);
page.modelName = (done) => (done ? `after ${done.toLocaleString("en")} iteration${done === 1 ? "" : "s"}` : "base model");
const score = (value) => (value === null ? "no score" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2));
const meanScore = (grid, rows) => {
  const found = (rows || grid.scores.map((_, i) => i)).flatMap((row) => grid.scores[row]).filter((value) => value !== null);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
};

const heading = (grid, mean) => {
  const name = page.modelName(grid.done);
  return `${name[0].toUpperCase()}${name.slice(1)}${mean === null ? "" : ` · mean of these pictures ${score(mean)}`}`;
};

// A tile of the grid's picture, in which the sources of a prompt stand before its samples.
function pictureOf(grid, row, place, label) {
  const percent = (at, of) => (of > 1 ? `${(100 * at) / (of - 1)}%` : "0"), columns = grid.sources + grid.columns;
  const picture = make("div", { role: "img", "aria-label": label });
  picture.className = Math.max(grid.width, grid.height) <= 64 ? "small" : "";
  Object.assign(picture.style, { aspectRatio: `${grid.width} / ${grid.height}`, backgroundImage: `url("${address(grid.src)}")`,
    backgroundSize: `${100 * columns}% ${100 * grid.rows}%`, backgroundPosition: `${percent(place, columns)} ${percent(row, grid.rows)}` });
  return picture;
}

const sourceOf = (grid, row, number) => make("figure", { class: "tile" },
  pictureOf(grid, row, number, `${grid.prompts[row]}: source picture ${number + 1}`), make("figcaption", {}, "source"));

function tile(grid, row, column, before) {
  const picture = pictureOf(grid, row, grid.sources + column, `${grid.prompts[row]}: ${page.modelName(grid.done)}, score ${score(grid.scores[row][column])}`);
  const value = grid.scores[row][column], change = before === undefined || before === null || value === null ? null : value - before;
  const told = change === null || Math.abs(change) < 0.005 ? null
    : make("span", { class: change > 0 ? "up" : "down" }, ` ${change > 0 ? "+" : "−"}${score(Math.abs(change))}`);
  return make("figure", { class: "tile" }, picture, make("figcaption", {}, score(value), told));
}

function tiles(grid, row, columns, before) {
  const all = grid.sources + columns;
  const found = make("div", { class: "tiles" }, Array.from({ length: grid.sources }, (_, number) => sourceOf(grid, row, number)),
    Array.from({ length: columns }, (_, column) => tile(grid, row, column, before && before[column])));
  found.style.gridTemplateColumns = `repeat(${all}, minmax(0, ${all < 3 ? "14rem" : "1fr"}))`;
  return found;
}

page.choice = function (label, options, current, choose) {
  return make("div", { class: "choice", role: "group", "aria-label": label }, options.map(([value, text]) =>
    make("button", { type: "button", "aria-pressed": String(value === current), "data-value": value, onclick: () => choose(value) }, text)));
};

// `state` keeps where the slider stands while the page is drawn anew; it follows the newest grid until it is moved.
page.drawSamples = function (element, run, state) {
  const grids = run.pictures.grids;
  if (state.moved === undefined || state.moved >= grids.length) state.moved = undefined;
  const output = make("output"), rows = rowsOf(grids[0], []);
  const slider = make("input", { type: "range", min: 0, max: grids.length - 1, step: 1, "aria-label": "evaluation" });
  slider.value = state.moved === undefined ? grids.length - 1 : state.moved;
  const show = () => {
    const grid = grids[Number(slider.value)], mean = meanScore(grid);
    output.textContent = heading(grid, mean);
    slider.setAttribute("aria-valuetext", output.textContent);
    rows.replaceChildren(...grid.prompts.map((prompt, row) => make("div", { class: "row" }, make("p", { class: "prompt", title: prompt }, prompt), tiles(grid, row, grid.columns))));
  };
  slider.addEventListener("input", () => { state.moved = Number(slider.value); show(); });
  element.replaceChildren(make("div", { class: "bar" }, output, grids.length > 1 ? slider : null), rows);
  show();
};

page.drawComparison = function (element, run, state) {
  const grids = run.pictures.grids, [before, after] = [grids[0], grids.at(-1)], pairs = run.pictures.common;
  const columns = Math.min(before.columns, after.columns), names = [before, after].map((grid) => page.modelName(grid.done));
  const mean = (at) => meanScore(at ? after : before, pairs.map((pair) => pair[at]));
  const one = (pair, at) => tiles(at ? after : before, pair[at], columns, at ? before.scores[pair[0]] : undefined);
  const show = () => {
    const view = state.view || "both", at = view === "before" ? 0 : 1;
    const both = (pair) => make("div", { class: columns < 3 ? "pair narrow" : "pair" }, [0, 1].map((which) =>
      make("div", {}, make("div", { class: "side-name" }, names[which]), one(pair, which))));
    const rows = pairs.map((pair) => make("div", { class: "row" }, make("p", { class: "prompt", title: before.prompts[pair[0]] }, before.prompts[pair[0]]),
      view === "both" ? both(pair) : one(pair, at)));
    const options = [["both", "Both"], ["before", names[0]], ["after", names[1]]];
    const text = view === "both" ? `Mean of these pictures: ${[0, 1].map((which) => score(mean(which))).join(" → ")}` : heading(at ? after : before, mean(at));
    element.replaceChildren(make("div", { class: "bar" }, page.choice("models", options, view, (value) => { state.view = value; show(); }), make("output", {}, text)),
      rowsOf(before, rows));
  };
  show();
};
})();
