// The explorer's pictures, each drawn on a canvas of its own, in the colours of the page.

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74",
  "#c3b369", "#e1cc55", "#fee838"].map(rgb);
// Blue for negative angles, orange for positive ones; the middle is that of the page.
const COLD = ["#0b4a9e", "#5e96d6"].map(rgb), WARM = ["#ee9b4e", "#a84300"].map(rgb);
export const COLOR_A = "#0072b2", COLOR_B = "#d55e00"; // Okabe and Ito

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function mix(list, t) {
  const x = Math.min(1, Math.max(0, t)) * (list.length - 1), i = Math.min(list.length - 2, x | 0);
  return list[i].map((value, c) => value + (x - i) * (list[i + 1][c] - value));
}

const css = (color) => `rgb(${color.map(Math.round).join(",")})`;

export function heat(t) {
  return mix(CIVIDIS, t);
}

export function signed(t, middle) {
  return t < 0 ? mix([middle, COLD[1], COLD[0]], -t) : mix([middle, WARM[0], WARM[1]], t);
}

/** The next round number above a value: ends of colour scales jump seldom. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return [1, 1.2, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8, 10].map((m) => m * power).find((m) => m >= value * (1 - 1e-9));
}

const short = (value) => String(+value.toPrecision(3));

/** A canvas that fits its box, cleared, and the page's colours. */
export function openCanvas(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  const width = Math.max(60, box.width), height = Math.max(20, box.height);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d"), style = getComputedStyle(canvas);
  g.scale(ratio, ratio);
  g.font = `11px ${style.fontFamily}`;
  const ink = style.color, faint = style.getPropertyValue("--bfm-line").trim() || "#999";
  const dark = isDark(style.getPropertyValue("color"));
  const paper = style.getPropertyValue("--bfm-paper").trim() || "transparent";
  return { g, width, height, ink, faint, dark, paper, middle: dark ? [58, 58, 58] : [236, 236, 236] };
}

/** A light ink means a dark page. */
function isDark(color) {
  const parts = (color.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
  return 0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2] > 128;
}

function text(page, words, x, y, { align = "left", base = "middle", color = page.ink } = {}) {
  Object.assign(page.g, { fillStyle: color, textAlign: align, textBaseline: base,
    strokeStyle: page.paper, lineWidth: 3, lineJoin: "round" });
  page.g.strokeText(words, x, y); // a halo, so that words stay readable on lines
  page.g.fillText(words, x, y);
}

function bar(page, x, y, length, thick, upright, colorOf) {
  for (let i = 0; i < length; i++) {
    page.g.fillStyle = css(colorOf(upright ? 1 - i / length : i / length));
    if (upright) page.g.fillRect(x, y + i, thick, 1.5);
    else page.g.fillRect(x + i, y, 1.5, thick);
  }
}

/** Pixels for a grid of colours, stretched without smoothing. */
function pixels(page, columns, rows, colorOf, x, y, width, height) {
  const image = new ImageData(columns, rows);
  for (let r = 0, at = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++, at += 4) {
      const [red, green, blue] = colorOf(r, c);
      image.data[at] = red;
      image.data[at + 1] = green;
      image.data[at + 2] = blue;
      image.data[at + 3] = 255;
    }
  }
  const sheet = document.createElement("canvas");
  sheet.width = columns;
  sheet.height = rows;
  sheet.getContext("2d").putImageData(image, 0, 0);
  page.g.imageSmoothingEnabled = false;
  page.g.drawImage(sheet, x, y, width, height);
}

function ticks(count, room) {
  const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64].find((s) => (count / s) * 22 <= room) || count;
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

/** Heatmap of E x E distances with the load of each expert; returns where its cells are. */
export function drawHeatmap(canvas, { E, values, a, b, load }) {
  const page = openCanvas(canvas), { g } = page;
  const left = 30, top = 30, right = load ? 92 : 58;
  const side = Math.max(40, Math.min(page.width - left - right, page.height - top - 8));
  const cell = side / E, limit = roundUp(values.reduce((most, v) => Math.max(most, v), 1e-3));
  pixels(page, E, E, (r, c) => heat(values[r * E + c] / limit), left, top, side, side);
  for (const i of ticks(E, side)) {
    text(page, i, left - 5, top + (i + 0.5) * cell, { align: "right" });
    text(page, i, left + (i + 0.5) * cell, top - 4, { align: "center", base: "bottom" });
  }
  text(page, "A\u2193", left - 5, top - 4, { align: "right", base: "bottom" });
  text(page, "B\u2192", left, 6);
  for (const [row, column] of [[a, b], [b, a]]) {
    g.lineWidth = 2;
    const x = left + column * cell, y = top + row * cell, size = Math.max(cell, 4);
    g.strokeStyle = "#000";
    g.strokeRect(x - 1, y - 1, size + 2, size + 2);
    g.setLineDash(row === a && column === b ? [] : [2, 2]);
    g.strokeStyle = "#fff";
    g.strokeRect(x + 0.5, y + 0.5, Math.max(1, size - 1), Math.max(1, size - 1));
    g.setLineDash([]);
  }
  let x = left + side + 8;
  if (load) {
    const most = load.reduce((m, v) => Math.max(m, v), 1);
    g.fillStyle = page.faint;
    load.forEach((n, i) => g.fillRect(x, top + i * cell, (26 * n) / most, Math.max(1, cell - 1)));
    text(page, "load", x, top - 4, { base: "bottom" });
    x += 36;
  }
  bar(page, x, top, side, 10, true, heat);
  for (const t of [0, 0.5, 1]) {
    text(page, short(t * limit), x + 14, top + side * (1 - t) + (t ? (t < 1 ? 0 : 5) : -5));
  }
  return { left, top, cell, side };
}

/** Where the experts send a probe vector. */
export function drawOrbits(canvas, { trails, a, b }) {
  const page = openCanvas(canvas), { g } = page;
  let reach = 1e-6;
  for (const trail of trails) for (const [u, v] of trail) reach = Math.max(reach, Math.hypot(u, v));
  let low = [0, 0], high = [0, 0];
  for (const trail of trails) {
    for (const point of trail) {
      low = low.map((value, i) => Math.min(value, point[i]));
      high = high.map((value, i) => Math.max(value, point[i]));
    }
  }
  const span = Math.max(high[0] - low[0], high[1] - low[1], 0.2 * reach) * 1.05;
  const size = Math.min(page.width - 30, page.height - 44), unit = size / span;
  const ox = page.width / 2 - (unit * (low[0] + high[0])) / 2;
  const oy = (page.height - 22) / 2 + (unit * (low[1] + high[1])) / 2 + 8;
  const at = ([u, v]) => [ox + unit * u, oy - unit * v];
  const paint = (e, color, wide, radius) => {
    g.strokeStyle = g.fillStyle = color;
    g.lineWidth = wide;
    g.beginPath();
    trails[e].forEach((point, i) => g[i ? "lineTo" : "moveTo"](...at(point)));
    g.stroke();
    g.beginPath();
    g.arc(...at(trails[e].at(-1)), radius, 0, 2 * Math.PI);
    g.fill();
  };
  trails.forEach((_, e) => e !== a && e !== b && paint(e, page.faint, 0.7, 2.6));
  const color = { A: page.dark ? "#56b4e9" : COLOR_A, B: page.dark ? "#ff9e4a" : COLOR_B };
  paint(b, color.B, 2.5, 5);
  paint(a, color.A, 2.5, 5);
  g.strokeStyle = page.ink;
  g.lineWidth = 1.5;
  g.beginPath();
  for (const [dx, dy] of [[-5, 0], [0, -5]]) {
    g.moveTo(ox + dx, oy + dy);
    g.lineTo(ox - dx, oy - dy);
  }
  g.stroke();
  const put = (words, [x, y], ink) => {
    const near = Math.min(page.width - 34, Math.max(4, x + 8));
    text(page, words, near, Math.min(page.height - 34, Math.max(10, y - 8)), { color: ink });
  };
  put("probe", [ox, oy + 20], page.ink);
  put(`B ${b}`, at(trails[b].at(-1)), color.B);
  if (a !== b) put(`A ${a}`, at(trails[a].at(-1)), color.A);
  const ruler = roundUp(span / 8), wide = ruler * unit;
  g.fillStyle = page.ink;
  g.fillRect(8, page.height - 9, wide, 2);
  text(page, `${short(ruler)} of the probe's length`, 14 + wide, page.height - 8);
}

/** The angles of one expert as a butterfly: lines for narrow layers, a strip a stage for wide. */
export function drawButterfly(canvas, { angles, d, stages, S, pairsOf, limit }) {
  const page = openCanvas(canvas), { g } = page, pairs = d >> 1;
  const left = 42, right = 54, top = 22, bottom = 8;
  const width = page.width - left - right, height = page.height - top - bottom;
  // a line needs more contrast to the page than a cell of a strip does
  const lines = page.dark ? [104, 108, 114] : [192, 196, 202];
  const middle = d <= 32 ? lines : page.middle;
  const table = pairsOf(d, S), color = (angle) => signed(angle / limit, middle);
  let cellOf;
  if (d <= 32) {
    const x = (s) => left + (width * s) / S, y = (i) => top + ((i + 0.5) * height) / d;
    for (let s = 0; s < S; s++) {
      const alone = new Set(Array.from({ length: d }, (_, i) => i)); // with an odd d one sits out
      for (let p = 0; p < pairs; p++) {
        const i = table[s].first[p], j = table[s].second[p], angle = angles[s * pairs + p];
        alone.delete(i);
        alone.delete(j);
        g.strokeStyle = css(color(angle));
        g.globalAlpha = s < stages ? 1 : 0.2;
        g.lineWidth = 1 + 2.5 * Math.min(1, Math.abs(angle) / limit);
        g.beginPath();
        for (const [from, to] of [[i, j], [j, i], [i, i], [j, j]]) {
          g.moveTo(x(s), y(from));
          g.lineTo(x(s + 1), y(to));
        }
        g.stroke();
      }
      g.strokeStyle = page.faint;
      g.lineWidth = 0.7;
      g.beginPath();
      for (const i of alone) {
        g.moveTo(x(s), y(i));
        g.lineTo(x(s + 1), y(i));
      }
      g.stroke();
    }
    g.globalAlpha = 1;
    g.fillStyle = page.ink;
    for (let s = 0; s <= S; s++) {
      for (let i = 0; i < d; i++) g.fillRect(x(s) - 1.5, y(i) - 1.5, 3, 3);
    }
    for (const i of ticks(d, height * 1.4)) text(page, i, left - 6, y(i), { align: "right" });
    cellOf = (px) => Math.floor(((px - left) / width) * S);
  } else {
    const rows = Math.min(d, 256), per = d / rows;
    const grid = Array.from({ length: S }, () => new Float32Array(rows));
    for (let s = 0; s < S; s++) {
      for (let p = 0; p < pairs; p++) {
        const angle = angles[s * pairs + p];
        for (const i of [table[s].first[p], table[s].second[p]]) {
          const r = Math.floor(i / per);
          if (Math.abs(angle) > Math.abs(grid[s][r])) grid[s][r] = angle;
        }
      }
    }
    const gap = 2, wide = width / S;
    for (let s = 0; s < S; s++) {
      g.globalAlpha = s < stages ? 1 : 0.2;
      pixels(page, 1, rows, (r) => color(grid[s][r]), left + s * wide, top, wide - gap, height);
    }
    g.globalAlpha = 1;
    for (const t of [0, 0.5, 1]) {
      text(page, Math.round(t * (d - 1)), left - 4, top + t * height + (t ? (t < 1 ? 0 : -5) : 5),
        { align: "right" });
    }
    cellOf = (px) => Math.floor((px - left) / wide);
  }
  for (let s = 0; s < S; s++) {
    text(page, s + 1, left + (width * (s + 0.5)) / S, top - 9, { align: "center" });
  }
  text(page, "stage", left - 4, top - 9, { align: "right" });
  const at = left + width + 10;
  bar(page, at, top, height, 10, true, (t) => signed(2 * t - 1, middle));
  for (const t of [0, 0.5, 1]) {
    const value = short((2 * t - 1) * limit);
    text(page, value, at + 14, top + height * (1 - t) + (t ? (t < 1 ? 0 : 5) : -5));
  }
  text(page, "rad", at + 14, top - 9);
  return {
    stage: (px) => Math.min(S - 1, Math.max(0, cellOf(px))),
    coordinate: (py) => Math.min(d - 1, Math.max(0, Math.floor(((py - top) / height) * d))),
  };
}

/** The loss at each record, and where we are. */
export function drawLosses(canvas, { steps, losses, checkpoint }) {
  const page = openCanvas(canvas), { g } = page;
  const known = losses.map((loss, i) => [steps[i], loss, i]).filter(([, loss]) => loss !== null);
  if (known.length < 2) return;
  const low = Math.min(...known.map((k) => k[1])), high = Math.max(...known.map((k) => k[1]));
  const from = steps[0], to = steps.at(-1), left = 62;
  const x = (step) => left + ((page.width - left - 8) * (step - from)) / Math.max(1, to - from);
  const y = (loss) => 6 + (page.height - 12) * (1 - (loss - low) / Math.max(1e-12, high - low));
  g.strokeStyle = page.faint;
  g.lineWidth = 1;
  g.beginPath();
  g.moveTo(x(steps[checkpoint]), 0);
  g.lineTo(x(steps[checkpoint]), page.height);
  g.stroke();
  g.strokeStyle = page.dark ? "#56b4e9" : COLOR_A;
  g.lineWidth = 1.5;
  g.beginPath();
  known.forEach(([step, loss], i) => g[i ? "lineTo" : "moveTo"](x(step), y(loss)));
  g.stroke();
  g.fillStyle = g.strokeStyle;
  for (const [step, loss, i] of known) {
    g.beginPath();
    g.arc(x(step), y(loss), i === checkpoint ? 4.5 : 2, 0, 2 * Math.PI);
    g.fill();
  }
  text(page, "loss", 0, page.height / 2);
  text(page, short(high), left - 5, 7, { align: "right" });
  text(page, short(low), left - 5, page.height - 7, { align: "right" });
}
