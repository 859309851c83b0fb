// The numbers of the explorer. lightning_bfmoe/viz/orbits.py is their twin in numpy and explains
// each formula; tests compare the two.

export const TRAIL = 24; // points of an orbit's trail
const TAU = 2 * Math.PI;

let halves = null;

/** Little-endian float16 bytes -> Float32Array. */
export function decodeHalf(view) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let code = 0; code < 65536; code++) {
      const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, fraction = code & 1023;
      halves[code] = sign * (exponent ? (exponent < 31 ? 2 ** (exponent - 25) * (1024 + fraction)
        : fraction ? NaN : Infinity) : 2 ** -24 * fraction);
    }
  }
  const out = new Float32Array(view.byteLength >> 1);
  for (let i = 0; i < out.length; i++) out[i] = halves[view.getUint16(2 * i, true)];
  return out;
}

const pairsOf = new Map();

/** The coordinates that each stage pairs, as functional.butterfly.stage_pairs gives them. */
export function stagePairs(d, stages) {
  const key = `${d}/${stages}`;
  if (pairsOf.has(key)) return pairsOf.get(key);
  let deck = Int32Array.from({ length: d }, (_, i) => i);
  const found = [], count = d >> 1;
  for (let s = 0; s < stages; s++) {
    const pairs = [];
    for (let p = 0; p < count; p++) {
      const left = deck[2 * p], right = deck[2 * p + 1];
      pairs.push(left < right ? [left, right] : [right, left]);
    }
    pairs.sort((one, two) => one[0] - two[0]);
    found.push({
      first: Int32Array.from(pairs, (pair) => pair[0]),
      second: Int32Array.from(pairs, (pair) => pair[1]),
    });
    const next = new Int32Array(d), front = (d + 1) >> 1;
    for (let i = 0; i < d; i++) next[i & 1 ? front + (i >> 1) : i >> 1] = deck[i];
    deck = next;
  }
  pairsOf.set(key, found);
  return found;
}

/** +1 or -1 for a row and a column: the same on every machine. */
export function sign(row, column) {
  let h = (Math.imul(row, 0x9e3779b1) + column + 1) | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) & 1 ? 1 : -1;
}

export function signs(row, d) {
  return Float32Array.from({ length: d }, (_, column) => sign(row, column));
}

/** Rotates `rows` rows of x (rows * d numbers) in place by angles[start...] * scale. */
export function rotate(x, rows, d, angles, start, stages, scale) {
  const pairs = d >> 1, table = stagePairs(d, stages);
  for (let s = 0; s < stages; s++) {
    const { first, second } = table[s];
    for (let p = 0; p < pairs; p++) {
      const angle = scale * angles[start + s * pairs + p], c = Math.cos(angle), n = Math.sin(angle);
      for (let k = 0, at = 0; k < rows; k++, at += d) {
        const i = at + first[p], j = at + second[p], left = x[i], right = x[j];
        x[i] = c * left - n * right;
        x[j] = n * left + c * right;
      }
    }
  }
  return x;
}

/** Whether all basis vectors are used, and how many vectors: the rule of orbits.num_probes. */
export function probing(experts, d) {
  const exact = d <= 1024 && experts * d <= 16384;
  const some = Math.min(64, Math.max(8, Math.floor(2 ** 28 / (experts * experts * d))));
  return { exact, count: exact ? d : some };
}

/**
 * Distances of all pairs of experts. A generator: it yields often, so that a caller can give the
 * page a turn, and returns { values, probes, error }.
 */
export function* distances(view, { measure, stages, scale }) {
  const { E, d, angles, start, S } = view, pairs = d >> 1, per = S * pairs;
  const values = new Float64Array(E * E);
  if (measure === "angle") {
    const used = stages * pairs;
    for (let a = 0; a < E; a++) {
      for (let b = a + 1; b < E; b++) {
        let sum = 0;
        const one = start + a * per, two = start + b * per;
        for (let i = 0; i < used; i++) {
          let gap = scale * (angles[one + i] - angles[two + i]);
          gap -= TAU * Math.round(gap / TAU);
          sum += gap * gap;
        }
        values[a * E + b] = values[b * E + a] = Math.sqrt(sum / used);
      }
      yield (a + 1) / E;
    }
    return { values, probes: 0, error: 0 };
  }
  const { exact, count } = probing(E, d), size = count * d;
  const base = new Float32Array(size);
  for (let k = 0; k < count; k++) {
    for (let i = 0; i < d; i++) base[k * d + i] = exact ? +(i === k) : sign(k, i);
  }
  const images = [];
  for (let e = 0; e < E; e++) {
    images.push(rotate(base.slice(), count, d, angles, start + e * per, stages, scale));
    yield (0.5 * (e + 1)) / E;
  }
  const whole = 2 * d * (exact ? 1 : count);
  for (let a = 0; a < E; a++) {
    for (let b = a + 1; b < E; b++) {
      const one = images[a], two = images[b];
      let sum = 0;
      for (let i = 0; i < size; i++) {
        const gap = one[i] - two[i];
        sum += gap * gap;
      }
      values[a * E + b] = values[b * E + a] = Math.sqrt(sum / whole);
      if ((b - a) * size > 2e6) yield 0.5 + (0.5 * a) / E;
    }
    yield 0.5 + (0.5 * (a + 1)) / E;
  }
  return { values, probes: count, error: exact ? 0 : Math.sqrt(2 / (count * d)) };
}

/** Mean over different experts. */
export function meanDistance(values, E) {
  let sum = 0;
  for (const value of values) sum += value;
  return sum / Math.max(1, E * (E - 1));
}

const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);

/** Two orthonormal axes from x to A's image and, beside it, towards B's. */
function plane(x, images) {
  const axes = [];
  images.forEach((image, row) => {
    let axis = Float64Array.from(image, (value, i) => value - x[i]);
    const straighten = () => {
      for (const other of axes) {
        const along = dot(axis, other);
        axis = axis.map((value, i) => value - along * other[i]);
      }
    };
    straighten();
    if (Math.sqrt(dot(axis, axis)) < 1e-6) {
      axis = Float64Array.from(signs(1000 + row, x.length));
      straighten();
    }
    const length = Math.sqrt(dot(axis, axis));
    axes.push(axis.map((value) => value / length));
  });
  return axes;
}

/**
 * Where each expert sends a probe vector: { trails, full }. trails[e] is a list of [u, v] that ends
 * at the expert's image; experts other than A and B have their whole trail only when that is cheap.
 */
export function orbits(view, last, { a, b, stages, scale, probe }) {
  const { E, d, angles, start, S } = view, per = S * (d >> 1);
  const norm = Math.sqrt(dot(probe, probe));
  const x = Float64Array.from(probe, (value) => value / norm);
  const image = (where, e, count, t) =>
    rotate(x.slice(), 1, d, where.angles, where.start + e * per, count, t);
  const [u, v] = plane(x, [a, b].map((e) => image(last, e, S, 1)));
  const full = E * stages * d * TRAIL < 3e6;
  const trails = [];
  for (let e = 0; e < E; e++) {
    const trail = [], first = full || e === a || e === b ? 0 : TRAIL;
    for (let i = first; i <= TRAIL; i++) {
      const y = image(view, e, stages, (scale * i) / TRAIL);
      let along = 0, beside = 0;
      for (let j = 0; j < d; j++) {
        along += (y[j] - x[j]) * u[j];
        beside += (y[j] - x[j]) * v[j];
      }
      trail.push([along, beside]);
    }
    trails.push(trail);
  }
  return { trails, full };
}
