// OrbitExplorer: controls, and who draws when. `model` is a widget's model, or a stand-in of the
// same four methods in a page without a kernel (static/page.js).
import { decodeHalf, distances, meanDistance, orbits, signs, stagePairs } from "./orbit_math.js";
import { drawButterfly, drawHeatmap, drawLosses, drawOrbits, roundUp } from "./orbit_draw.js";

const SLICE = 12; // milliseconds of arithmetic before the page gets a turn
const PLAY = 700; // milliseconds a checkpoint is shown
const SHARED = ["checkpoint", "layer", "rotation", "a", "b", "stages", "scale", "probe", "measure",
  "show"];
let widgets = 0;

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A labelled range with its value beside it. */
function slider(prefix, name, label, hint) {
  const input = element("input", { type: "range", id: `${prefix}-${name}`, title: hint });
  input.setAttribute("aria-label", name);
  const output = element("output", { htmlFor: input.id });
  const words = element("label", { htmlFor: input.id, title: hint }, label);
  return { input, output, box: element("div", { className: "bfm-slider" }, words, input, output) };
}

function choice(prefix, name, label, hint) {
  const input = element("select", { id: `${prefix}-${name}`, title: hint });
  input.setAttribute("aria-label", name);
  const words = element("label", { htmlFor: input.id, title: hint }, label);
  return { input, box: element("div", { className: "bfm-choice" }, words, input) };
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, words]) => element("option", { value }, words)));
  select.value = chosen;
}

function panel(title, hint, name, focusable) {
  const canvas = element("canvas", { className: `bfm-${name}`, role: "img", "aria-label": title });
  if (focusable) canvas.tabIndex = 0;
  const caption = element("figcaption", {}, title, element("small", {}, hint));
  return { canvas, caption, box: element("figure", { className: "bfm-panel" }, caption, canvas) };
}

/** Angles of one rotation at one record, as the mathematics wants them. */
function lookAt(block, angles, checkpoint) {
  const { E, S, d } = block;
  return { E, S, d, angles, start: checkpoint * E * S * (d >> 1) };
}

function render({ model, el }) {
  const meta = model.get("meta"), prefix = `bfm${++widgets}`;
  const steps = meta.steps, records = steps.length;
  const loaded = new Map(), asked = new Set();
  const view = model.get("angles"), vectors = model.get("probes");
  for (const { block, offset, bytes } of meta.inline) {
    loaded.set(block, decodeHalf(new DataView(view.buffer, view.byteOffset + offset, bytes)));
  }
  let job = 0, timer = null, playing = false, busy = false, map = null, wings = null, latest = null;

  const range = {
    checkpoint: slider(prefix, "checkpoint", "checkpoint", "record of the training"),
    a: slider(prefix, "a", "expert A", "row of the heatmap"),
    b: slider(prefix, "b", "expert B", "column of the heatmap"),
    stages: slider(prefix, "stages", "stages", "how many stages of the butterfly are applied"),
    scale: slider(prefix, "scale", "angle scale", "factor of every angle: 0 is the identity"),
    probe: slider(prefix, "probe", "probe", "which vector the experts rotate"),
  };
  const pick = {
    layer: choice(prefix, "layer", "layer", "path in the model"),
    rotation: choice(prefix, "rotation", "matrix", "matrix, and the side of it that is rotated"),
    measure: choice(prefix, "measure", "distance", "what the heatmap shows"),
    show: choice(prefix, "show", "angles of", "whose angles the butterfly shows"),
  };
  const play = element("button", { type: "button", className: "bfm-play" });
  const losses = element("canvas", { className: "bfm-losses", role: "img",
    "aria-label": "training loss at each record",
    hidden: meta.losses.filter((loss) => loss !== null).length < 2 });
  const heatmap = panel("Distance of experts", "", "heatmap", true);
  const scatter = panel("Orbit of a probe vector", "", "orbit", false);
  const wing = panel("Butterfly", "", "butterfly", false);
  const readout = element("output", { className: "bfm-readout" });
  readout.setAttribute("aria-live", "polite");
  el.replaceChildren(element("div", { className: "bfm-explorer" },
    element("div", { className: "bfm-row" }, play, range.checkpoint.box, losses),
    element("div", { className: "bfm-row" }, ...Object.values(pick).map((item) => item.box)),
    element("div", { className: "bfm-row" }, ...["a", "b", "stages", "scale", "probe"]
      .map((name) => range[name].box)),
    element("div", { className: "bfm-panels" }, heatmap.box, scatter.box, wing.box), readout));
  const root = el.firstChild;
  heatmap.canvas.setAttribute("aria-description",
    "Arrow keys choose experts: up and down A, left and right B.");

  const blockIndex = () => {
    const layer = model.get("layer"), rotation = model.get("rotation");
    const at = meta.blocks.findIndex((b) => b.layer === layer && b.rotation === rotation);
    return Math.max(0, at);
  };
  const clamp = (value, high, low = 0) => Math.min(high, Math.max(low, value));

  function state() {
    const at = blockIndex(), block = meta.blocks[at];
    return {
      at, block, checkpoint: clamp(model.get("checkpoint"), records - 1),
      a: clamp(model.get("a"), block.E - 1), b: clamp(model.get("b"), block.E - 1),
      stages: clamp(model.get("stages"), block.S, 1), scale: model.get("scale"),
      probe: clamp(model.get("probe"), probesOf(block.d) - 1), measure: model.get("measure"),
      show: model.get("show"),
    };
  }

  const probesOf = (d) => (meta.probes && meta.probes.d === d ? meta.probes.rows : 8);

  function probeVector(d, row) {
    if (!(meta.probes && meta.probes.d === d)) return signs(row, d);
    const bytes = vectors.buffer.slice(vectors.byteOffset + 4 * row * d,
      vectors.byteOffset + 4 * (row + 1) * d);
    return new Float32Array(bytes);
  }

  function set(changes) {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
    update();
  }

  function controls(now) {
    const { block } = now;
    const bounds = { checkpoint: [0, records - 1], a: [0, block.E - 1], b: [0, block.E - 1],
      stages: [1, block.S], scale: [0, 2], probe: [0, probesOf(block.d) - 1] };
    for (const [name, { input, output }] of Object.entries(range)) {
      [input.min, input.max] = bounds[name];
      input.step = name === "scale" ? 0.01 : 1;
      input.value = now[name];
      input.disabled = bounds[name][0] === bounds[name][1];
      output.value = name === "checkpoint" ? `step ${steps[now.checkpoint]}`
        : name === "scale" ? now.scale.toFixed(2)
          : name === "stages" ? `${now.stages} of ${block.S}` : now[name];
    }
    const layers = [...new Set(meta.blocks.map((b) => b.layer))];
    fill(pick.layer.input, layers.map((name) => [name, name]), block.layer);
    const beside = meta.blocks.filter((b) => b.layer === block.layer);
    fill(pick.rotation.input, beside.map((b) => [b.rotation, `${b.rotation} (d=${b.d})`]),
      block.rotation);
    fill(pick.measure.input, [["rotation", "rotations"], ["angle", "angles (rad)"]], now.measure);
    fill(pick.show.input, [["a", `A (${now.a})`], ["b", `B (${now.b})`], ["gap", "A - B"]],
      now.show);
    play.textContent = playing ? "\u23F8 Pause" : "\u25B6 Play";
    play.setAttribute("aria-pressed", playing);
    play.disabled = records < 2;
  }

  function quick(now, angles) {
    const { block } = now, here = lookAt(block, angles, now.checkpoint);
    const per = block.S * (block.d >> 1), rotated = probeVector(block.d, now.probe);
    const last = lookAt(block, angles, records - 1);
    latest = orbits(here, last, { ...now, probe: rotated });
    drawOrbits(scatter.canvas, { ...latest, a: now.a, b: now.b });
    const slice = (e) => angles.subarray(here.start + e * per, here.start + (e + 1) * per);
    const one = slice(now.a), two = slice(now.b);
    const shown = now.show === "gap" ? one.map((angle, i) => {
      const gap = angle - two[i];
      return gap - 2 * Math.PI * Math.round(gap / (2 * Math.PI));
    }) : (now.show === "a" ? one : two).slice();
    for (let i = 0; i < shown.length; i++) shown[i] *= now.scale;
    const limit = roundUp(shown.reduce((most, v) => Math.max(most, Math.abs(v)), 1e-3));
    wings = { ...drawButterfly(wing.canvas, { angles: shown, d: block.d, stages: now.stages,
      S: block.S, pairsOf: stagePairs, limit }), shown, block };
    drawLosses(losses, { steps, losses: meta.losses, checkpoint: now.checkpoint });
    const name = { a: `expert ${now.a}`, b: `expert ${now.b}`, gap: `${now.a} minus ${now.b}` };
    const wide = block.d > 256 ? `, the largest of ${Math.ceil(block.d / 256)} a cell` : "";
    wing.caption.lastChild.textContent = `angles of ${name[now.show]}${wide}`;
    scatter.caption.lastChild.textContent = "plane through the probe and its images under A and B "
      + "at the last record";
    heatmap.caption.lastChild.textContent = now.measure === "angle"
      ? "rms difference of the angles, rad" : "\u2016B_A \u2212 B_B\u2016 / \u221A(2d): "
      + "0 equal, 1 unrelated";
  }

  function finish(now, { values, probes, error }) {
    const { block, a, b } = now, E = block.E;
    const load = block.loads ? block.loads[now.checkpoint] : null;
    map = { ...drawHeatmap(heatmap.canvas, { E, values, a, b, load }), E, values };
    const distance = values[a * E + b], mean = meanDistance(values, E);
    const loss = meta.losses[now.checkpoint];
    const words = [`experts ${a} and ${b}: ${distance.toFixed(4)}`,
      `mean of all pairs: ${mean.toFixed(4)}`, `step ${steps[now.checkpoint]}`];
    if (error) words[1] += ` (estimated with ${probes} probes, D\u00B2 \u00B1 ${error.toFixed(4)})`;
    if (loss !== null) words.push(`loss ${loss.toFixed(4)}`);
    readout.value = words.join("  \u00B7  ");
    const [u, v] = latest.trails[a].at(-1);
    Object.assign(readout.dataset, { distance, mean, u, v, checkpoint: now.checkpoint, a, b,
      stages: now.stages, scale: now.scale, layer: block.layer, rotation: block.rotation });
    root.removeAttribute("aria-busy");
    busy = false;
  }

  function update() {
    const now = state(), mine = ++job;
    controls(now);
    if (!loaded.has(now.at)) {
      readout.value = "Waiting for the angles of this matrix. They come from the kernel: if it is "
        + "not running, run the cell again.";
      if (!asked.has(now.at)) model.send({ want: now.at });
      asked.add(now.at);
      return;
    }
    const angles = loaded.get(now.at);
    root.setAttribute("aria-busy", "true");
    busy = true;
    const work = distances(lookAt(now.block, angles, now.checkpoint), now);
    const turn = () => {
      if (mine !== job) return; // something newer is being drawn
      for (const begin = performance.now(); performance.now() - begin < SLICE;) {
        const { done, value } = work.next();
        if (done) return finish(now, value);
      }
      setTimeout(turn, 0);
    };
    requestAnimationFrame(() => {
      if (mine !== job) return;
      quick(now, angles);
      turn();
    });
  }

  function toggle() {
    playing = !playing;
    clearInterval(timer);
    if (playing) {
      if (state().checkpoint === records - 1) set({ checkpoint: 0 });
      timer = setInterval(() => {
        const at = state().checkpoint;
        if (busy) return;
        if (at < records - 1) set({ checkpoint: at + 1 });
        else toggle();
      }, PLAY);
    }
    controls(state());
  }

  for (const [name, { input }] of Object.entries(range)) {
    input.addEventListener("input", () => set({ [name]: Number(input.value) }));
  }
  const land = (block) => {
    const S = state().block.S === state().stages ? block.S : Math.min(state().stages, block.S);
    set({ layer: block.layer, rotation: block.rotation, stages: S,
      a: clamp(model.get("a"), block.E - 1), b: clamp(model.get("b"), block.E - 1) });
  };
  pick.layer.input.addEventListener("change", () => {
    const there = meta.blocks.filter((b) => b.layer === pick.layer.input.value);
    land(there.find((b) => b.rotation === model.get("rotation")) || there[0]);
  });
  pick.rotation.input.addEventListener("change", () => land(meta.blocks.find((b) =>
    b.layer === model.get("layer") && b.rotation === pick.rotation.input.value)));
  for (const name of ["measure", "show"]) {
    pick[name].input.addEventListener("change", () => set({ [name]: pick[name].input.value }));
  }
  play.addEventListener("click", toggle);
  const cellUnder = (event) => {
    const box = heatmap.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - map.left) / map.cell);
    const row = Math.floor((event.clientY - box.top - map.top) / map.cell);
    return [row, column].every((i) => i >= 0 && i < map.E) ? [row, column] : null;
  };
  heatmap.canvas.addEventListener("click", (event) => {
    const cell = map && cellUnder(event);
    if (cell) set({ a: cell[0], b: cell[1] });
  });
  heatmap.canvas.addEventListener("mousemove", (event) => {
    const cell = map && cellUnder(event);
    heatmap.canvas.title = cell ? `experts ${cell[0]} and ${cell[1]}: `
      + map.values[cell[0] * map.E + cell[1]].toFixed(4) : "";
  });
  // Keys belong to what has the focus. A notebook listens on the document before we do, moves to
  // another cell at an arrow and deletes one at "d d", so we listen a step earlier.
  const onKey = (event) => {
    if (!root.contains(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" || (event.key === "Enter" && event.shiftKey)) return;
    event.stopPropagation();
    const moves = { ArrowUp: ["a", -1], ArrowDown: ["a", 1], ArrowLeft: ["b", -1],
      ArrowRight: ["b", 1] };
    if (event.target !== heatmap.canvas || !(event.key in moves)) return;
    event.preventDefault(); // the page would scroll
    const [name, by] = moves[event.key], now = state();
    set({ [name]: clamp(now[name] + by, now.block.E - 1) });
  };
  window.addEventListener("keydown", onKey, true);
  wing.canvas.addEventListener("mousemove", (event) => {
    if (!wings) return;
    const box = wing.canvas.getBoundingClientRect(), pairs = wings.block.d >> 1;
    const s = wings.stage(event.clientX - box.left), i = wings.coordinate(event.clientY - box.top);
    const { first, second } = stagePairs(wings.block.d, wings.block.S)[s];
    const p = first.findIndex((one, at) => one === i || second[at] === i);
    wing.canvas.title = p < 0 ? `stage ${s + 1}: coordinate ${i} sits out`
      : `stage ${s + 1}: coordinates ${first[p]} and ${second[p]}, `
      + `${wings.shown[s * pairs + p].toFixed(3)} rad`;
  });
  const arrived = (message, buffers) => {
    if (message.block === undefined || !buffers.length) return;
    const bytes = buffers[0].buffer ? buffers[0] : new DataView(buffers[0]);
    loaded.set(message.block,
      decodeHalf(new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)));
    update();
  };
  model.on("msg:custom", arrived);
  for (const name of SHARED) model.on(`change:${name}`, update);

  // The page's size or colours changed: draw again.
  let width = 0;
  const resized = new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) > 1) update();
    width = entry.contentRect.width;
  });
  resized.observe(root);
  const themed = new MutationObserver(update);
  themed.observe(document.body, { attributes: true,
    attributeFilter: ["class", "data-jp-theme-light", "data-theme", "data-vscode-theme-kind"] });
  themed.observe(document.documentElement, { attributes: true,
    attributeFilter: ["class", "data-theme"] });
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", update);
  update();
  return () => {
    clearInterval(timer);
    job++;
    resized.disconnect();
    themed.disconnect();
    window.removeEventListener("keydown", onKey, true);
    scheme.removeEventListener("change", update);
    model.off("msg:custom", arrived);
    for (const name of SHARED) model.off(`change:${name}`, update);
  };
}

export default { render };
