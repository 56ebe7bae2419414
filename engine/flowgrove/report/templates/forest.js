// Forests as pictures: drawForests(element, forests) draws one of the content's "forests", with a choice of the
// iteration; called again with the same it leaves all as it is. What comes from a run is set as text, never as HTML.
(() => {
  "use strict";

  const page = (window.flowgrove = window.flowgrove || {});

  const WHY = {
    depth: "no: depths are pruned, and this step is one of them",
    parent_top1: "no: pruned, as its sibling scores higher",
    extreme: "no: pruned, as no best or worst picture follows",
    step_fraction: "no: not among the steps drawn for it (update.step_fraction)",
  };

  const number = (value) => (value === null ? "not known" : String(Number(value.toPrecision(4))).replace("-", "−"));
  // an advantage as part of the largest, −1 … 1; a root, so that the many small ones differ in colour too
  const colour = (share) => `color-mix(in oklab, var(--neutral), var(--${share < 0 ? "negative" : "positive"}) `
    + `${(100 * Math.abs(share) ** 0.6).toFixed(1)}%)`;

  function html(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // Steps as they are drawn: each with noise for itself, those without in one line as far as they follow each other.
  function segmentsOf(steps) {
    const found = [];
    steps.forEach((step, index) => {
      const last = found[found.length - 1];
      if (last && !step.stochastic && !last.stochastic) last.to = index + 1;
      else found.push({ from: index, to: index + 1, stochastic: step.stochastic, step });
    });
    return found;
  }

  // The states at the ends of segments, each with the edge that leads to it: one thing to point at.
  function itemsOf(forest, segments) {
    const leaves = forest.totals.length;
    const columns = [{ level: 0, nodes: forest.steps[0].nodes_in }];
    for (const segment of segments) columns.push({ level: segment.to, nodes: forest.steps[segment.to - 1].nodes_out });
    columns.forEach((column, place) => {
      const segment = place ? segments[place - 1] : null;
      const edges = segment && segment.stochastic ? forest.edges[segment.from] : null;
      const before = place ? columns[place - 1] : null;
      column.items = Array.from({ length: column.nodes }, (_, node) => {
        const parent = before && before.items[Math.floor((node * before.nodes) / column.nodes)];
        const width = leaves / column.nodes;
        const item = { place, node, level: column.level, segment, parent, children: [], width, first: node * width };
        item.leaf = place === segments.length;
        item.picture = forest.pictures?.places[`${column.level}/${node}`]; // its number in the mosaic
        if (edges) {
          for (const key of ["advantage", "logp", "weight", "update", "untrained"]) item[key] = edges[key][node];
        }
        if (parent) parent.children.push(item);
        return item;
      });
    });
    return columns;
  }

  function stepsNamed(segment) {
    const last = segment.to - 1;
    return segment.from === last ? `step ${last}` : `steps ${segment.from}–${last}`;
  }

  // What is to be said of an item, as [name, value] lines.
  function linesOf(forest, item) {
    const { steps, totals, rewards } = forest;
    const lines = [];
    if (item.segment) {
      lines.push(["σ", `${number(steps[item.segment.from].sigma)} → ${number(steps[item.segment.to - 1].sigma_next)}`]);
      if (!item.segment.stochastic) lines.push(["trains", "no: there is no noise"]);
    } else lines.push(["σ", number(steps[0].sigma)]);
    if (item.segment?.stochastic) {
      lines.push(["advantage", number(item.advantage)], ["log-probability", number(item.logp)]);
      if (item.untrained) lines.push(["trains", WHY[item.untrained] ?? `no: ${item.untrained}`]);
      else lines.push(["trains in", `update ${item.update + 1} of ${forest.updates}`], ["weight", number(item.weight)]);
    }
    if (item.leaf) {
      rewards.forEach(([name, weight], index) =>
        lines.push([weight === 1 ? name : `${name} × ${number(weight)}`, number(forest.scores[item.node][index])]));
      if (rewards.length > 1) lines.push(["weighted sum", number(totals[item.node])]);
      lines.push(["rank", `${1 + totals.filter((each) => each > totals[item.node]).length} of ${totals.length}`]);
    } else {
      const below = totals.slice(item.first, item.first + item.width);
      lines.push(["leaves below", String(below.length)]);
      lines.push(["their mean reward", number(below.reduce((sum, each) => sum + each, 0) / below.length)]);
    }
    return lines;
  }

  function titleOf(item) {
    const name = item.leaf ? `leaf ${item.node}` : item.segment ? `node ${item.node}` : `start ${item.node}`;
    const way = item.segment ? `, ${stepsNamed(item.segment)}` : "";
    return name[0].toUpperCase() + name.slice(1) + way + (item.picture >= 0 && !item.leaf ? ", clean estimate" : "");
  }

  function measure(forest, segments, columns, room) {
    const leaves = forest.totals.length;
    const pitch = leaves <= 8 ? 68 : leaves <= 16 ? 52 : leaves <= 32 ? 42 : leaves <= 64 ? 36 : 22;
    const ratio = forest.pictures ? Math.min(2.4, forest.pictures.width / forest.pictures.height) : 1;
    columns.forEach((column, place) => {
      const most = Math.min((pitch * leaves) / column.nodes - 4, place === segments.length ? 64 : 48);
      column.high = column.items.some((item) => item.picture >= 0) ? most : 0;
      column.wide = column.high * ratio;
      column.gap = place === segments.length ? 0 : segments[place].stochastic ? 54 : 44; // to the next column
    });
    const taken = columns.reduce((sum, column) => sum + column.wide + column.gap, 12 + 112);
    const more = Math.max(0, Math.min(90, (room - taken) / segments.length));
    columns.forEach((column, place) => {
      const before = columns[place - 1];
      column.x = before ? before.right + before.gap + more : 12;
      column.right = column.x + column.wide;
    });
    return { pitch, width: columns[segments.length].right + 112, height: leaves * pitch + 8 };
  }

  function axisOf(forest, segments, columns, size) {
    const axis = svg("svg", { class: "forest-axis", width: size.width, height: 50, "aria-hidden": "true" });
    segments.forEach((segment, place) => {
      const middle = (columns[place].right + columns[place + 1].x) / 2;
      if (segment.step.window && segment.stochastic) axis.append(bandOf(columns, place, 50));
      const { from, to, step: { fanout, window: inside } } = segment;
      const name = to - from === 1 ? `step ${from}` : `${to - from} steps`;
      const below = !segment.stochastic ? "no noise" : fanout > 1 ? `split × ${fanout}` : inside ? "window" : "noise";
      axis.append(svg("text", { x: middle, y: 13, "text-anchor": "middle" }, name));
      axis.append(svg("text", { x: middle, y: 27, "text-anchor": "middle", class: "quiet" }, below));
    });
    columns.forEach((column, place) => {
      const sigma = Number((forest.steps[column.level]?.sigma ?? 0).toFixed(2));
      const at = { x: Math.max(14, middleOf(column)), y: 44, "text-anchor": "middle", class: "quiet" };
      axis.append(svg("text", at, place ? String(sigma) : `σ ${sigma}`));
    });
    axis.append(svg("text", { x: columns[columns.length - 1].right + 8, y: 13 }, "reward"));
    return axis;
  }

  const middleOf = (column) => (column.x + column.right) / 2;

  function bandOf(columns, place, height) {
    const [x, end] = [columns[place], columns[place + 1]].map(middleOf);
    return svg("rect", { class: "band", x, y: 0, width: end - x, height });
  }

  // One tile of the mosaic, which is laid out so that a tile is one unit wide and high.
  function tileOf({ src, rows, columns, width, height }, number, box) {
    const whole = { href: src, width: columns, height: rows, preserveAspectRatio: "none" };
    if (Math.max(width, height) <= 64) whole.class = "pixels";
    const viewBox = `${number % columns} ${Math.floor(number / columns)} 1 1`;
    return svg("svg", { ...box, viewBox, preserveAspectRatio: "none" }, svg("image", whole));
  }

  function drawItem(forest, columns, size, item, scale, order) {
    const column = columns[item.place];
    const y = (item.first + item.width / 2) * size.pitch + 4;
    item.y = y;
    const label = `${titleOf(item)}. ${linesOf(forest, item).map((line) => line.join(" ")).join(", ")}`;
    const group = svg("g", { class: "item", tabindex: item.parent || item.node ? -1 : 0, role: "img", "aria-label": label });
    if (item.parent) {
      const start = columns[item.place - 1].right;
      const middle = (start + column.x) / 2;
      const way = `M${start} ${item.parent.y}C${middle} ${item.parent.y} ${middle} ${y} ${column.x} ${y}`;
      const edge = svg("path", { class: "edge", d: way });
      if (item.segment.stochastic) {
        const share = scale ? (item.advantage ?? 0) / scale : 0;
        edge.classList.add("noise", ...(item.untrained ? ["untrained"] : []));
        edge.style.stroke = colour(share);
        edge.style.strokeWidth = `${(1.4 + 3.2 * Math.abs(share)).toFixed(2)}px`;
        edge.dataset.advantage = item.advantage;
      }
      group.append(edge, svg("path", { class: "reach", d: way }));
    }
    if (item.picture >= 0) {
      const box = { x: column.x, y: y - column.high / 2, width: column.wide, height: column.high };
      group.append(tileOf(forest.pictures, item.picture, box), svg("rect", { ...box, class: "frame" }));
    } else group.append(svg("circle", { cx: middleOf(column), cy: y, r: 3 }));
    if (item.leaf) {
      const [least, most] = [Math.min(...forest.totals), Math.max(...forest.totals)];
      const share = most > least ? (forest.totals[item.node] - least) / (most - least) : 0;
      group.append(svg("rect", { class: "bar", x: column.right + 8, y: y + 3, width: 4 + 76 * share, height: 4, rx: 2 }));
      const text = svg("text", { x: column.right + 8, y: y - 1 }, number(forest.totals[item.node]));
      if (share === 1) text.setAttribute("font-weight", "bold");
      group.append(text);
    }
    item.group = group;
    order.set(group, item);
    return group;
  }

  function drawTree(element, forest) {
    const segments = segmentsOf(forest.steps);
    const columns = itemsOf(forest, segments);
    const size = measure(forest, segments, columns, element.clientWidth);
    const tree = svg("svg", { class: "forest-tree", width: size.width, height: size.height, role: "group",
      "aria-label": "Forest: arrow keys go from node to node" });
    segments.forEach((segment, place) => {
      if (segment.step.window && segment.stochastic) tree.append(bandOf(columns, place, size.height));
    });
    const all = columns.flatMap((column) => column.items);
    const scale = Math.max(0, ...all.map((item) => Math.abs(item.advantage ?? 0)));
    const order = new Map();
    const groups = all.map((item) => drawItem(forest, columns, size, item, scale, order));
    tree.append(...groups.reverse()); // a node lies above the edges that leave it
    const box = html("div", { className: "forest-box" }, axisOf(forest, segments, columns, size), tree);
    listen(box, tree, forest, columns, order);
    return { box, scale };
  }

  function hideNote(box) {
    box.querySelector(".forest-note").hidden = true;
    box.classList.remove("dim");
  }

  document.addEventListener("pointerdown", ({ target }) => {
    document.querySelectorAll(".forest-box").forEach((box) => box.contains(target) || hideNote(box));
  });

  // Pointer, finger and keyboard: what is pointed at tells its numbers, and its way from the start stands out.
  function listen(box, tree, forest, columns, order) {
    const note = html("div", { className: "forest-note", hidden: true, ariaHidden: "true" });
    box.append(note);
    let shown = null;
    const show = (item, x, y) => {
      if (shown !== item) {
        tree.querySelectorAll(".lit").forEach((group) => group.classList.remove("lit"));
        const light = (each) => (each.group.classList.add("lit"), each.children.forEach(light));
        light(item);
        for (let each = item.parent; each; each = each.parent) each.group.classList.add("lit");
        note.replaceChildren(html("b", { textContent: titleOf(item) }));
        if (item.picture >= 0) {
          const { width, height } = forest.pictures;
          const box = { width: 160, height: (160 * height) / width };
          note.prepend(svg("svg", box, tileOf(forest.pictures, item.picture, box)));
        }
        note.append(html("dl", {}, ...linesOf(forest, item).flatMap(([name, value]) => [
          html("dt", { textContent: name }), html("dd", { textContent: value })])));
        shown = item;
      }
      box.classList.add("dim");
      note.hidden = false;
      const { offsetWidth: wide, offsetHeight: high } = note;
      note.style.left = `${Math.max(4, x + 18 + wide > innerWidth ? x - 18 - wide : x + 18)}px`;
      note.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - high - 4))}px`;
    };
    const hide = () => hideNote(box);
    const itemAt = (event) => order.get(event.target.closest?.("g.item"));
    const point = (event) => {
      const item = itemAt(event);
      return item ? show(item, event.clientX, event.clientY) : hide();
    };
    tree.addEventListener("pointermove", point);
    tree.addEventListener("click", point);
    tree.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    box.addEventListener("focusin", (event) => {
      const item = itemAt(event);
      const place = event.target.getBoundingClientRect();
      if (item && event.target.matches(":focus-visible")) show(item, place.right, place.top);
    });
    box.addEventListener("focusout", hide); // an svg that listens to these takes the focus itself
    box.addEventListener("scroll", hide);
    tree.addEventListener("keydown", (event) => {
      const item = itemAt(event);
      const peers = item && columns[item.place].items;
      const next = item && {
        ArrowRight: item.children[0], ArrowLeft: item.parent, ArrowUp: peers[item.node - 1], ArrowDown: peers[item.node + 1],
      }[event.key];
      if (event.key === "Escape") hide();
      if (!next) return;
      event.preventDefault();
      item.group.setAttribute("tabindex", -1);
      next.group.setAttribute("tabindex", 0);
      next.group.focus({ focusVisible: true });
    });
  }

  function legendOf(scale) {
    const line = (name, text) => html("span", {},
      svg("svg", { width: 30, height: 6 }, svg("path", { class: `edge ${name}`, d: "M0 3H30" })), text);
    const bar = html("span", { className: "scale" });
    const stops = [-1, -0.6, -0.3, -0.1, 0, 0.1, 0.3, 0.6, 1].map((share) => `${colour(share)} ${50 + 50 * share}%`);
    bar.style.background = `linear-gradient(to right, ${stops})`;
    const range = scale ? [`advantage −${number(scale)}`, bar, `+${number(scale)}`] : ["all advantages are 0"];
    return html("div", { className: "forest-legend" }, html("span", {}, ...range),
      line("noise", "trains"), line("noise untrained", "does not train"), line("", "no noise"));
  }

  function factsOf(forest) {
    const { steps, totals, edges } = forest;
    const [passes, alone] = [steps.reduce((sum, step) => sum + step.nodes_in, 0), totals.length * steps.length];
    const noisy = Object.values(edges).flatMap((each) => each.untrained);
    const trained = noisy.filter((why) => why === null).length;
    const start = steps[0].nodes_in > 1 ? `${steps[0].nodes_in} noises` : "one noise";
    return `${totals.length} pictures from ${start}, in ${passes} passes of the model`
      + `${alone > passes ? ` instead of ${alone}` : ""}; ${trained} of ${noisy.length} edges with noise train.`;
  }

  function draw(element, forest) {
    const { box, scale } = drawTree(element, forest);
    element.querySelector(".forest-body").replaceChildren(
      html("p", { className: "forest-prompt", textContent: `“${forest.prompt}”` }),
      html("p", { className: "forest-facts", textContent: factsOf(forest) }), legendOf(scale), box);
  }

  page.drawForests = (element, forests) => {
    const named = JSON.stringify(forests.map((forest) => [forest.iteration, forest.prompt, forest.totals]));
    if (!forests.length || element.dataset.forests === named) return;
    element.dataset.forests = named;
    element.classList.add("forest");
    const choice = html("select", {}, ...forests.map((forest, place) =>
      html("option", { value: place, textContent: forest.iteration, selected: place === forests.length - 1 })));
    choice.addEventListener("change", () => draw(element, forests[choice.value]));
    const label = html("label", {}, "iteration ", choice);
    label.hidden = forests.length < 2;
    element.replaceChildren(label, html("div", { className: "forest-body" }));
    draw(element, forests[forests.length - 1]);
  };
})();
