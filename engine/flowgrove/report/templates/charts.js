// The curves of a report: what each shows, and how plotly draws it. A run is an object of content.py.
(function () {
"use strict";

const page = (window.flowgrove = window.flowgrove || {});
const MANY = 8; // colours

// Plotly reads <b> and the like in its texts: what users wrote stays text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (values) => values.some((value) => value !== null && value !== undefined);
const scaled = (values, factor) => values.map((value) => (value === null ? null : value * factor));
const shifted = (values, by) => values.map((value) => (value === null ? null : value + by));
const around = (middle, half, sign) => middle.map((value, i) => (value === null || half[i] === null ? null : value + sign * half[i]));

function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: of("ink"), muted: of("muted"), line: of("line"), grid: of("grid"), page: of("page"), panel: of("panel"),
    colours: Array.from({ length: MANY }, (_, i) => of(`c${i}`)) };
}

function faded(colour, share) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${share})`;
}

// Iterations, or the seconds of all stages so far in the unit that fits the longest run.
function axis(runs, kind) {
  if (kind === "iteration") return { title: "iteration", says: "iteration %{x}", of: (place) => place.iteration };
  const longest = Math.max(...runs.map((run) => run.x.seconds.at(-1) || 0));
  const [unit, size] = longest < 300 ? ["seconds", 1] : longest < 18000 ? ["minutes", 60] : ["hours", 3600];
  return { title: `${unit} in stages`, says: `%{x:.4~g} ${unit}`, of: (place) => place.seconds.map((value) => value / size) };
}

const NUMBER = "%{y:.4~g}";

function line(name, x, y, colour, more = {}) {
  return { type: "scatter", mode: "lines", name: plain(name), x, y, line: { color: colour, width: 1.8, ...(more.line || {}) },
    hovertemplate: more.says || NUMBER, ...(more.trace || {}) };
}

// Two traces without a hover of their own; a click on the legend of their group hides them too.
function band(group, x, low, high, colour, share = 0.16) {
  const edge = { type: "scatter", mode: "lines", x, line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: group };
  return [{ ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor: faded(colour, share) }];
}

function level(value, text, look) {
  return {
    shape: { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: look.muted, width: 1, dash: "dash" } },
    annotation: { xref: "paper", x: 1, y: value, xanchor: "right", yanchor: "bottom", showarrow: false, text, font: { size: 10.5, color: look.muted } },
  };
}

const PLUS_MINUS = (half) => (half ? { says: "%{y:.4~g} ± %{customdata:.2~g}", trace: { customdata: half } } : {});
const tag = (ctx, run, text) => (ctx.one ? text : text ? `${run.name} · ${text}` : run.name);

function rewardTraces(ctx, run, i, train, trainHalf, heldOut, heldOutHalf, words) {
  const x = ctx.x.of(run.x), at = ctx.x.of(run.held_out);
  const [loud, quiet] = ctx.one ? [ctx.look.colours[0], ctx.look.colours[1]] : [ctx.look.colours[i % MANY], ctx.look.colours[i % MANY]];
  const group = `train${i}`, other = `held${i}`, traces = [];
  if (trainHalf && ctx.one) traces.push(...band(group, x, around(train, trainHalf, -1), around(train, trainHalf, 1), quiet, 0.12));
  const soft = { ...PLUS_MINUS(trainHalf), line: { width: 1.4, ...(ctx.one ? {} : { dash: "dot" }) } };
  if (train) traces.push(line(tag(ctx, run, words[0]), x, train, quiet, { ...soft, trace: { ...soft.trace, legendgroup: group } }));
  if (known(heldOut)) {
    if (known(heldOutHalf)) traces.push(...band(other, at, around(heldOut, heldOutHalf, -1), around(heldOut, heldOutHalf, 1), loud, 0.2));
    const told = PLUS_MINUS(known(heldOutHalf) ? heldOutHalf : null);
    const marks = at.length <= 60 ? { mode: "lines+markers", marker: { color: loud, size: 6 } } : {};
    traces.push(line(tag(ctx, run, words[1]), at, heldOut, loud, { ...told, line: { width: 2.4 }, trace: { ...told.trace, ...marks, legendgroup: other } }));
  }
  return traces;
}

function reward(ctx) {
  const traces = ctx.runs.flatMap((run, i) => {
    const single = run.rewards.length === 1 ? run.rewards[0] : null;
    const half = single ? scaled(single.std, Math.abs(single.weight)) : null;
    return rewardTraces(ctx, run, i, run.series.reward, half, run.held_out.mean, run.held_out.confidence,
      [half && ctx.one ? "training prompts, ± standard deviation" : "training prompts", known(run.held_out.confidence) && ctx.one ? "held-out prompts, 95 % interval" : "held-out prompts"]);
  });
  return { traces, layout: { height: 380 } };
}

// Those that train, and then those that only evaluations give.
const rewardNames = (run) => [...run.rewards.map((each) => each.name), ...run.eval_rewards];

function oneReward(name) {
  return (ctx) => {
    const traces = ctx.runs.flatMap((run, i) => {
      const at = rewardNames(run).indexOf(name);
      if (at < 0) return [];
      const told = run.held_out.rewards[at], trained = run.rewards[at] || { mean: null, std: null };
      return rewardTraces(ctx, run, i, trained.mean, trained.std, told.mean, told.confidence, ["training prompts", "held-out prompts"]);
    });
    return { traces };
  };
}

function ratio(ctx) {
  const traces = ctx.runs.flatMap((run, i) => {
    const x = ctx.x.of(run.x), colour = ctx.look.colours[i % MANY], group = `ratio${i}`;
    if (!known(run.series.ratio_mean)) return [];
    const [low, high] = ["ratio_min", "ratio_max"].map((key) => shifted(run.series[key], -1));
    const ends = low.map((value, j) => [value, high[j]]);
    return [...band(group, x, low, high, colour, ctx.one ? 0.22 : 0.1),
      line(tag(ctx, run, ctx.one ? "mean, with smallest and largest" : ""), x, shifted(run.series.ratio_mean, -1), colour,
        { says: "%{y:.3~g} (%{customdata[0]:.3~g} … %{customdata[1]:.3~g})", trace: { customdata: ends, legendgroup: group } })];
  });
  const ranges = new Set(ctx.runs.map((run) => JSON.stringify(run.clip_range)));
  const marks = ranges.size === 1 ? [level(-ctx.runs[0].clip_range[0], "clip range", ctx.look), level(ctx.runs[0].clip_range[1], "clip range", ctx.look)] : [];
  return { traces, layout: { shapes: marks.map((mark) => mark.shape), annotations: marks.map((mark) => mark.annotation),
    yaxis: { exponentformat: "power", zeroline: true } } };
}

// Several metrics of one run each in a colour, of several runs each run in a colour and each metric in a dash.
function several(metrics, more = {}, layout = {}) {
  const dashes = ["solid", "dot", "dash"];
  return (ctx) => {
    const traces = ctx.runs.flatMap((run, i) => metrics.flatMap(([key, name, factor], j) => {
      const values = run.series[key];
      if (!known(values) || (more.positive && !values.some((value) => value > 0))) return [];
      const colour = ctx.look.colours[(ctx.one ? j : i) % MANY];
      return [line(tag(ctx, run, ctx.one || metrics.length > 1 ? name : ""), ctx.x.of(run.x), factor ? scaled(values, factor) : values, colour,
        { says: more.says, line: { dash: ctx.one ? "solid" : dashes[j] } })];
    }));
    return { traces, layout: { ...layout, showlegend: traces.length > 1 } };
  };
}

function divergence(ctx) {
  const { traces } = several([["approx_kl", "approx_kl"]], { positive: true, says: "%{y:.2e}" })(ctx);
  traces.forEach((trace) => { trace.y = trace.y.map((value) => (value > 0 ? value : null)); });
  const usual = Math.max(...ctx.runs[0].clip_range) ** 2 / 2;
  const mark = ctx.one ? [level(Math.log10(usual), "usual for the clip range", ctx.look)] : [];
  mark.forEach(({ shape }) => { shape.y0 = shape.y1 = usual; });
  return { traces, layout: { yaxis: { type: "log", exponentformat: "power", dtick: 1 }, showlegend: !ctx.one,
    shapes: mark.map((each) => each.shape), annotations: mark.map((each) => each.annotation) } };
}

// What rollout.precision and rollout.attention move final latents by, at every evaluation.
function distance(ctx) {
  const traces = ctx.runs.flatMap((run, i) => !known(run.held_out.distance) ? []
    : [line(tag(ctx, run, ""), ctx.x.of(run.held_out), run.held_out.distance, ctx.look.colours[i % MANY], { says: "%{y:.2%}" })]);
  return { traces, layout: { yaxis: { tickformat: ".1%", rangemode: "tozero" }, showlegend: traces.length > 1 } };
}

function advantage(run) {
  return (ctx) => {
    const { steps, values } = run.advantage;
    if (!steps.length) return { traces: [] };
    const scale = [[0, faded(ctx.look.colours[0], 0.06)], [1, ctx.look.colours[0]]];
    const bar = { thickness: 10, outlinewidth: 0, tickfont: { size: 11 }, nticks: 5 };
    return { traces: [{ type: "heatmap", x: ctx.x.of(run.x), y: steps, z: values, zmin: 0, zmax: Math.max(1, ...values.flat()), colorscale: scale, colorbar: bar, hoverongaps: false,
      hovertemplate: `${ctx.x.says}<br>step %{y}: %{z:.3f}<extra></extra>` }],
    layout: { hovermode: "closest", yaxis: { title: { text: "step of the schedule" }, dtick: steps.length <= 12 ? 1 : undefined, showgrid: false }, xaxis: { showgrid: false } } };
  };
}

// Signal to noise of the gradient, over the run and by step of the schedule.
function snr(ctx) {
  const traces = ctx.runs.flatMap((run, i) => {
    const { over } = run.gradient, colour = ctx.look.colours[i % MANY], x = ctx.x.of(over), group = `snr${i}`;
    if (!over.snr.length) return [];
    const marks = x.length <= 60 ? { mode: "lines+markers", marker: { color: colour, size: 5 } } : {}, told = PLUS_MINUS(over.interval);
    return [...band(group, x, around(over.snr, over.interval, -1), around(over.snr, over.interval, 1), colour, ctx.one ? 0.18 : 0.1),
      line(tag(ctx, run, ctx.one ? "all steps, 95 % interval" : ""), x, over.snr, colour, { ...told, trace: { ...told.trace, ...marks, legendgroup: group } })];
  });
  return { traces, layout: { yaxis: { zeroline: true } } };
}

const STEPS = (steps) => ({ title: { text: "step of the schedule" }, dtick: steps.length <= 20 ? 1 : undefined, unifiedhovertitle: { text: "step %{x}" }, uirevision: "steps" });

function snrBySteps(ctx) {
  const traces = ctx.runs.flatMap(({ gradient, name }, i) => {
    if (!gradient.steps.length) return [];
    const bars = { type: "data", array: gradient.interval, color: ctx.look.muted, thickness: 1.2, width: 4 };
    return [{ type: "bar", name: plain(ctx.one ? "signal to noise, 95 % interval" : name), x: gradient.steps, y: gradient.snr, error_y: bars, customdata: gradient.interval,
      hovertemplate: "%{y:.3~g} ± %{customdata:.2~g}", marker: { color: ctx.look.colours[i % MANY] } }];
  });
  return { traces, layout: { yaxis: { zeroline: true }, xaxis: STEPS(ctx.runs.flatMap((run) => run.gradient.steps)), showlegend: !ctx.one } };
}

function noiseBySteps(ctx) {
  const traces = ctx.runs.flatMap(({ gradient, name }, i) => {
    const bar = (title, y, colour) => ({ type: "bar", name: plain(title), x: gradient.steps, y, hovertemplate: "%{y:.0%}", marker: { color: colour } });
    if (!gradient.steps.length) return [];
    if (!ctx.one) return [bar(name, gradient.noise, ctx.look.colours[i % MANY])];
    const signal = gradient.signal.length ? [bar("share of the signal", gradient.signal, ctx.look.colours[0])] : [];
    return [...signal, bar("share of the noise", gradient.noise, ctx.look.colours[1])];
  });
  return { traces, layout: { yaxis: { tickformat: ".0%", zeroline: true }, xaxis: STEPS(ctx.runs.flatMap((run) => run.gradient.steps)), showlegend: true } };
}

function stages(ctx) {
  if (!ctx.one) {
    const traces = ctx.runs.map((run, i) => {
      const parts = Object.values(run.stages);
      return line(run.name, ctx.x.of(run.x), run.x.iteration.map((_, j) => parts.reduce((sum, part) => sum + (part[j] || 0), 0)), ctx.look.colours[i % MANY], { says: "%{y:.3~s}s" });
    });
    return { traces, layout: { yaxis: { rangemode: "tozero", ticksuffix: " s" } } };
  }
  const run = ctx.runs[0], order = ["rollout", "reward", "update", "plan", "credit", "gradient_noise"];
  const names = [...order.filter((name) => name in run.stages), ...Object.keys(run.stages).filter((name) => !order.includes(name))];
  const traces = names.map((name, j) => line(name, ctx.x.of(run.x), run.stages[name], ctx.look.colours[j % MANY],
    { says: "%{y:.3~s}s", line: { width: 0.5 }, trace: { stackgroup: "stages", fillcolor: faded(ctx.look.colours[j % MANY], 0.55) } }));
  return { traces, layout: { yaxis: { rangemode: "tozero", ticksuffix: " s" } } };
}

function passes(ctx) {
  const traces = ctx.runs.flatMap((run, i) => [["rollout_forwards", "rollout forwards"], ["train_passes", "train passes"]].flatMap(([key, name], j) => {
    const colour = ctx.look.colours[(ctx.one ? j : i) % MANY], x = ctx.x.of(run.x);
    const own = line(tag(ctx, run, name), x, run.series[key], colour, { says: "%{y:,.0f}", line: { dash: ctx.one || !j ? "solid" : "dot" } });
    if (!ctx.one || !run.unshared) return [own];
    return [own, line(`${name}, nothing shared`, x, run.unshared[key], colour, { says: "%{y:,.0f}", line: { dash: "dash", width: 1.2 } })];
  }));
  return { traces, layout: { yaxis: { rangemode: "tozero" } } };
}

function alike(ctx) {
  const some = ctx.runs.map((run, i) => [run, i]).filter(([run]) => run.series.zero_std_ratio.some((value) => value > 0));
  const traces = some.map(([run, i]) => line(tag(ctx, run, ""), ctx.x.of(run.x), run.series.zero_std_ratio, ctx.look.colours[i % MANY], { says: "%{y:.1%}" }));
  return { traces, layout: { yaxis: { tickformat: ".0%", rangemode: "tozero" } } };
}

function trouble(ctx) {
  const counts = [["skipped_updates", "updates skipped"], ["dropped_prompts", "prompts dropped"]];
  const traces = ctx.runs.flatMap((run, i) => counts.flatMap(([key, name], j) => {
    if (!run.series[key].some((value) => value > 0)) return [];
    return [{ type: "bar", name: plain(tag(ctx, run, name)), x: ctx.x.of(run.x), y: run.series[key], hovertemplate: "%{y}",
      marker: { color: ctx.look.colours[(ctx.one ? j + 1 : i) % MANY] } }];
  }));
  return { traces, layout: { barmode: "stack", yaxis: { rangemode: "tozero" }, showlegend: true } };
}

// All charts of some runs by section: id, heading, what it says, the metric whose healthy values stand below it, and
// what draws it. One without traces is left out.
page.charts = function (runs) {
  const trained = new Set(runs.flatMap((run) => run.rewards.map((each) => each.name)));
  // the only one that trains is the chart of them all
  const names = [...new Set(runs.flatMap(rewardNames))].filter((name) => trained.size > 1 || !trained.has(name));
  const weight = (name) => runs[0].rewards.find((one) => one.name === name);
  const each = names.map((name) => ({ id: `reward of ${name}`, title: name, metric: "eval_rewards", build: oneReward(name),
    says: !trained.has(name) ? "Raw score that nothing trains on: held-out mean with its 95 % interval."
      : `Raw score${runs.length > 1 ? "" : `, weight ${weight(name).weight}`}: mean of an iteration, band of one standard deviation; held-out mean with its 95 % interval.` }));
  return {
    reward: [{ id: "reward", wide: true, metric: "eval_reward", title: "Reward on training and held-out prompts", build: reward,
      says: "Training pictures are drawn with exploration noise and other prompts each time; held-out pictures with the same prompts, seeds and sampler throughout." }, ...each],
    policy: [
      { id: "ratio", metric: "ratio_mean", title: "Policy ratio − 1", says: "How far the updates of an iteration have moved the policy from the one that drew its pictures.", build: ratio },
      { id: "clipped", metric: "clipped_low", title: "Clipped edges", says: "Share of the trained edges whose ratio has left the clip range.",
        build: several([["clipped_high", "above the range"], ["clipped_low", "below the range"]], { says: "%{y:.1%}" }, { yaxis: { tickformat: ".0%", rangemode: "tozero" } }) },
      { id: "divergence", metric: "approx_kl", title: "Divergence of an iteration's updates", says: "approx_kl per latent element, on a logarithmic scale. Late steps of the schedule have less noise and more of it.", build: divergence },
      { id: "gradient", metric: "grad_norm", title: "Gradient norm before clipping", says: "Mean over the updates of an iteration.",
        build: several([["grad_norm", "gradient norm"]], {}, { yaxis: { rangemode: "tozero" } }) },
      { id: "distance", metric: "rollout_distance", title: "Distance of rollouts to those of full cost", build: distance,
        says: "Of final latents drawn with rollout.precision or rollout.attention from those of the same noise without them, over their norm." },
      { id: "snr", metric: "gradient_snr", title: "Signal to noise of the gradient", build: snr,
        says: "Squared length of the expected gradient over the noise around it, in the mean of up to 20 measurements to that point." },
      { id: "snr by step", metric: "gradient_signal", title: "Signal to noise by step", build: snrBySteps,
        says: "The same of every step, in the latest 20 measurements. Where the interval reaches below 0, no signal can be told from none." },
      { id: "noise by step", metric: "gradient_noise", title: "Where the noise comes from", build: noiseBySteps,
        says: `Every step's share of the noise${runs.length > 1 ? "" : ", and of the signal where there is one beyond doubt"}: a step with much noise and little signal drowns the others.` },
      ...runs.map((run, i) => ({ id: `advantage ${i}`, metric: "advantage_by_step", title: `Strength of the advantage by step${runs.length > 1 ? `: ${run.name}` : ""}`, wide: runs.length === 1,
        says: "Mean |advantage| of the edges that train. Where a cell is empty, the step trained nothing: the window stood elsewhere, or it was pruned.", build: advantage(run) })),
    ],
    cost: [
      { id: "stages", wide: true, metric: "seconds", title: "Seconds of an iteration", says: runs.length > 1 ? "All stages together." : "Stage by stage, one upon the other.", build: stages },
      { id: "passes", metric: "rollout_forwards", title: "Rows through the transformer", says: runs.length > 1 ? "Rollout forwards and train passes of an iteration." : "Solid: this run. Dashed: the same algorithm in a loop that shares nothing.", build: passes },
      { id: "memory", metric: "peak_memory_bytes", title: "Peak memory", says: "The most that the run has held so far, in GiB.",
        build: several([["peak_memory_bytes", "peak memory", 2 ** -30]], { says: "%{y:.2f} GiB" }, { yaxis: { rangemode: "tozero" } }) },
      { id: "alike", metric: "zero_std_ratio", title: "Prompts whose samples score alike", says: "Share of an iteration's prompts without an advantage, as no reward tells their samples apart.", build: alike },
      { id: "trouble", metric: "skipped_updates", title: "Skipped updates and dropped prompts", says: "Iterations that lost something.", build: trouble },
    ],
  };
};

const merged = (a, b) => {
  const found = { ...a };
  for (const [key, value] of Object.entries(b || {})) {
    found[key] = value && typeof value === "object" && !Array.isArray(value) ? merged(a[key] || {}, value) : value;
  }
  return found;
};

page.context = (runs, kind) => ({ runs, one: runs.length === 1, x: axis(runs, kind), kind, look: theme() });

page.draw = function (element, ctx, built) {
  const { look, x, kind } = ctx;
  const narrow = element.clientWidth < 480, touch = window.matchMedia("(pointer: coarse)").matches;
  const lines = { gridcolor: look.grid, linecolor: look.line, zeroline: false, zerolinecolor: look.line, automargin: true, fixedrange: touch, tickfont: { size: 11.5 } };
  const layout = merged({
    height: 270, margin: { l: 46, r: 10, t: 10, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12.5, color: look.ink },
    hovermode: "x unified", hoverlabel: { bgcolor: look.page, bordercolor: look.line, font: { color: look.ink, size: 12 } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, bgcolor: "rgba(0,0,0,0)" },
    dragmode: touch ? false : "zoom", uirevision: "keep",
    xaxis: { ...lines, title: { text: x.title, font: { size: 12, color: look.muted }, standoff: 8 }, uirevision: kind, nticks: narrow ? 6 : 10, unifiedhovertitle: { text: x.says } },
    yaxis: { ...lines, nticks: 6, title: { font: { size: 12, color: look.muted } } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: look.muted, activecolor: look.ink },
  }, built.layout);
  return Plotly.react(element, built.traces, layout, { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] });
};
})();
