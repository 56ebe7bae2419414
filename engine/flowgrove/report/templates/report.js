// The page: sections, switches and what stands in them. render(runs) draws it, and draws it anew with newer contents.
(function () {
"use strict";

const page = (window.flowgrove = window.flowgrove || {});
const { make, choice } = page;
const state = { x: "iteration", samples: [], views: [], runs: [] };
let metrics = {};

// Brings the children of an element to these [key, make, update], keeping those that are there.
function arrange(parent, items) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const kept = items.map(([key, create, update]) => {
    const child = old.get(key) || create();
    child.dataset.key = key;
    old.delete(key);
    return [child, update];
  });
  old.forEach((child) => { child.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.purge(plot)); child.remove(); });
  kept.forEach(([child], at) => { if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] || null); });
  kept.forEach(([child, update]) => update && update(child));
}

const section = (id, title, says) => () => make("section", { id }, make("h2", {}, title), says ? make("p", { class: "says" }, says) : null, make("div", { class: "inside" }));
const inside = (element) => element.querySelector(":scope > .inside");
const colour = (i) => `var(--c${i % 8})`;
const named = (runs, run, i) => (runs.length === 1 ? null : make("h3", {}, make("span", { class: "dot", style: `background:${colour(i)}` }), run.name));

function top(runs) {
  const one = runs.length === 1;
  const done = (run) => run.error || `${run.iterations.toLocaleString("en")} of ${run.planned.toLocaleString("en")} iterations`;
  const name = one ? [make("h1", {}, runs[0].name), make("p", { class: "state" }, done(runs[0]))]
    : [make("h1", {}, `${runs.length} runs`), make("ul", { class: "runs" }, runs.map((run, i) => make("li", { class: "state" }, make("span", { class: "dot", style: `background:${colour(i)}` }), `${run.name}: ${done(run)}`)))];
  const theme = document.documentElement.dataset.theme || "auto";
  return [make("div", { class: "name" }, name), make("div", { class: "switches" },
    choice("horizontal axis", [["iteration", "Iterations"], ["seconds", "Time"]], state.x, (value) => { state.x = value; draw(); }),
    choice("colours", [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]], theme, paint))];
}

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("flowgrove-theme", theme); } catch { /* a page that may not remember */ }
  draw();
}

function facts(element, runs) {
  if (runs.length === 1) {
    element.replaceChildren(make("dl", { class: "facts" }, runs[0].facts.map(([name, value, note]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, value), note ? make("dd", { class: "note" }, note) : null))));
    return;
  }
  const names = [...new Set(runs.flatMap((run) => run.facts.map(([name]) => name)))];
  const of = (run, name) => (run.facts.find((fact) => fact[0] === name) || [])[1] || "";
  element.replaceChildren(table(["", ...names], runs.map((run) => [run.name, ...names.map((name) => of(run, name))])));
}

function table(heads, rows, classes = []) {
  const cells = (tag, row) => make("tr", {}, row.map((cell, i) => make(tag, { class: classes[i] || null }, cell)));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, cells("th", heads)), make("tbody", {}, rows.map((row) => cells("td", row)))));
}

const findingId = (finding, i) => `finding-${finding.name}${i ? `-${i}` : ""}`;

function findings(element, runs) {
  const found = runs.flatMap((run, i) => run.findings.map((finding) => [run, finding, findingId(finding, i)]));
  const young = runs.every((run) => run.iterations < 10);
  const none = young ? make("p", { class: "says" }, "Curves are judged after 10 iterations.")
    : make("p", { class: "fine" }, "No warnings. Looked at: held-out against training reward, divergence, ratio, clipping, spread of the groups, skipped updates, dropped prompts, and signal and noise of the gradient where they are measured.");
  element.replaceChildren(found.length ? make("div", { class: "findings" }, found.map(([run, finding, id]) =>
    make("div", { class: `finding ${finding.kind}`, id }, make("h3", {}, finding.title),
      runs.length > 1 ? make("p", { class: "run" }, run.name) : null, make("p", {}, finding.text), make("p", { class: "do" }, make("b", {}, "What to do: "), finding.action)))) : none);
}

function card(chart) {
  const [meaning, healthy, otherwise] = metrics[chart.metric] || [];
  const told = healthy ? make("details", { class: "healthy" }, make("summary", {}, "What is healthy"),
    make("p", {}, make("b", {}, "Healthy: "), healthy), make("p", {}, make("b", {}, "Else: "), otherwise)) : null;
  return make("figure", { class: chart.wide ? "chart wide" : "chart" }, make("h3", { title: meaning || null }, make("span", {}, chart.title), make("span", { class: "marks" })),
    make("p", { class: "says" }, chart.says), make("div", { class: "plot", role: "img", "aria-label": `${chart.title}. ${chart.says}` }), told);
}

function charts(element, list, ctx) {
  const drawn = list.map((chart) => [chart, chart.build(ctx)]).filter(([, built]) => built.traces.length);
  arrange(element, drawn.map(([chart, built]) => [chart.id, () => card(chart), (figure) => {
    const here = (finding) => finding.metric === chart.metric || (finding.metric === "reward" && chart.id === "reward");
    figure.querySelector(".marks").replaceChildren(...ctx.runs.flatMap((run, i) => run.findings.filter(here).map((finding) =>
      make("a", { class: `mark ${finding.kind}`, href: `#${findingId(finding, i)}` }, finding.title))));
    page.draw(figure.querySelector(".plot"), ctx, built);
  }]));
}

function recipe(element, runs) {
  const open = [...element.querySelectorAll("details")].map((each) => each.open);
  const whole = runs.map((run, i) => {
    const found = make("details", {}, make("summary", {}, runs.length > 1 ? `The whole recipe of ${run.name}` : "The whole recipe"), make("pre", {}, run.recipe.yaml));
    found.open = Boolean(open[i]);
    return found;
  });
  if (runs.length === 1) {
    const rows = runs[0].recipe.changed.map((row) => row.map((cell) => make("code", {}, cell)));
    element.replaceChildren(table(["key", "value", "default"], rows, ["", "", "default"]), ...whole);
    return;
  }
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.recipe.settings)))];
  const differ = keys.filter((key) => new Set(runs.map((run) => run.recipe.settings[key])).size > 1);
  const rows = differ.map((key) => [key, ...runs.map((run) => run.recipe.settings[key] ?? "")].map((cell) => make("code", {}, cell)));
  element.replaceChildren(differ.length ? table(["key", ...runs.map((run) => run.name)], rows) : make("p", { class: "says" }, "The recipes are the same."), ...whole);
}

// One panel for each run that has something to show in it.
function panels(element, runs, has, drawPanel) {
  arrange(element, runs.flatMap((run, i) => (has(run) ? [[String(i), () => make("div", { class: "pictures" }, make("div"), make("div")), (panel) => {
    panel.children[0].replaceChildren(...[named(runs, run, i)].filter(Boolean));
    drawPanel(panel.children[1], run, i);
  }]] : [])));
}

function draw() {
  const { runs } = state, drawable = runs.filter((run) => run.iterations > 0);
  const of = (list, i) => (list[i] = list[i] || {});
  const has = { samples: (run) => run.pictures.grids.length > 0, both: (run) => run.pictures.common.length > 0, forest: (run) => run.forests.length > 0 };
  const items = [["top", () => make("header", { class: "top" }), (element) => element.replaceChildren(...top(runs))]];
  const add = (wanted, id, title, says, update) => { if (wanted) items.push([id, section(id, title, says), (element) => update(inside(element))]); };
  if (!drawable.length) items.push(["empty", () => make("p", { class: "says" }, "No iteration is done yet.")]);
  const ctx = drawable.length ? page.context(drawable, state.x) : null, all = ctx ? page.charts(drawable) : {};
  const curves = (id) => (element) => { element.classList.add("charts"); charts(element, all[id], ctx); };
  if (ctx) items.push(["facts", () => make("div"), (element) => facts(element, drawable)]);
  add(ctx, "findings", "What the curves say", null, (element) => findings(element, drawable));
  add(ctx, "rewards", "What the model learned", null, curves("reward"));
  add(drawable.some(has.both), "comparison", "Before and after, on the same prompts and seeds", "Held-out prompts. The number below a picture is its reward; behind it, the change from the first model on the same seed.",
    (element) => panels(element, drawable, has.both, (panel, run, i) => page.drawComparison(panel, run, of(state.views, i))));
  add(drawable.some(has.samples), "samples", "Samples over the run", "What the held-out prompts gave at each evaluation, always from the same seeds.",
    (element) => panels(element, drawable, has.samples, (panel, run, i) => page.drawSamples(panel, run, of(state.samples, i))));
  add(drawable.some(has.forest), "forest", "The forest of one prompt", "From noise on the left to pictures on the right. Where a line parts, noise was drawn; its colour says whether what follows scored better or worse than the rest. Inside, the model's guess at the picture.",
    (element) => panels(element, drawable, has.forest, (panel, run) => page.drawForests(panel, run.forests)));
  add(ctx, "policy", "How the policy moved", null, curves("policy"));
  add(ctx, "cost", "What it cost", null, curves("cost"));
  const read = runs.filter((run) => !run.error);
  add(read.length, "recipe", read.length > 1 ? "In which keys the recipes differ" : "Recipe: keys that differ from their defaults", null, (element) => recipe(element, read));
  const every = Math.max(...runs.map((run) => run.every || 1));
  items.push(["foot", () => make("footer"), (element) => { element.textContent = `${every > 1 ? `A point is up to ${every} iterations. ` : ""}Click a name in a legend to hide it, drag over a curve to zoom, double-click to zoom out.`; }]);
  arrange(document.getElementById("report"), items);
}

// `seconds`: what the last drawing took.
page.render = function (runs) {
  const start = performance.now();
  state.runs = runs;
  draw();
  page.seconds = (performance.now() - start) / 1000;
};

window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
const given = JSON.parse(document.getElementById("content").textContent);
metrics = given.metrics;
document.getElementById("report").replaceChildren();
page.render(given.runs);
})();
