// The stored arrays: decoding, and the maps made of them. No drawing, no page.

// Rows of `n` bytes with an offset and a step each: value = offset + step * byte.
class Rows {
  constructor(offsets, steps, bytes, n) {
    Object.assign(this, { offsets, steps, bytes, n });
  }
  value(row, i) {
    return this.offsets[row] + this.steps[row] * this.bytes[row * this.n + i];
  }
}

async function inflate(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// Arrays in the order in which they were encoded; `shapes` is a list of [rows, n].
async function decodeRows(id, shapes) {
  const element = document.getElementById(id);
  const buffer = await inflate(element.textContent);
  element.textContent = ""; // a second copy that nobody reads
  const all = shapes.reduce((sum, [rows]) => sum + rows, 0);
  const floats = new Float32Array(littleEndian(buffer.slice(0, 8 * all)));
  let row = 0, byte = 8 * all;
  return shapes.map(([rows, n]) => {
    const found = new Rows(
      floats.subarray(row, row + rows), floats.subarray(all + row, all + row + rows),
      new Uint8Array(buffer, byte, rows * n), n);
    row += rows;
    byte += rows * n;
    return found;
  });
}

function littleEndian(buffer) {
  if (new Uint8Array(new Uint16Array([1]).buffer)[0]) return buffer;
  const view = new DataView(buffer);
  for (let i = 0; i < buffer.byteLength; i += 4) view.setUint32(i, view.getUint32(i, true));
  return buffer;
}

// What one network makes of one picture. Tokens are counted with the special ones first; a map is
// {values, halfSteps}, both over all tokens of a layer, or null where a token is not there.
class View {
  constructor(stored, network) {
    Object.assign(this, stored);
    this.network = network;
    this.patches = network.rows * network.columns;
    this.attention = {}; // kind -> a Rows for each layer
  }

  async open() {
    const { kinds, heads, classSpecials } = this.network;
    const rows = kinds.flatMap(() => classSpecials.map((special) => [heads, special + this.patches]));
    const found = await decodeRows(this.blob, [...rows, [this.maps, this.patches]]);
    this.patchMaps = found.pop();
    this.classRows = Object.fromEntries(
      kinds.map((kind, i) => [kind, found.slice(i * classSpecials.length, (i + 1) * classSpecials.length)]));
    if (!this.selfAttention) return;
    await Promise.all(kinds.map(async (kind) => {
      const shapes = this.network.specials.map((special) => {
        const tokens = special + this.patches;
        return [heads * tokens, tokens];
      });
      this.attention[kind] = await decodeRows(`${this.blob}-${kind}`, shapes);
    }));
  }

  get depth() {
    return this.network.specials.length;
  }

  // A network that does not mix its heads has the same maps before and after.
  kind(wanted) {
    return this.network.kinds.includes(wanted) ? wanted : this.network.kinds[0];
  }

  // `token` is {patch} or {special}; null where the layer does not have it.
  tokenIndex(layer, token) {
    const special = this.network.specials[layer];
    if (token.special === undefined) return special + token.patch;
    return token.special < special ? token.special : null;
  }

  // What a token reads ("reads") or who reads it ("read"); `head` is a number, "mean" or "max".
  tokenMap(kind, layer, head, direction, token) {
    const index = this.tokenIndex(layer, token);
    if (index === null || !this.selfAttention) return null;
    const rows = this.attention[this.kind(kind)][layer];
    const tokens = rows.n;
    const at = direction === "reads"
      ? (h, i) => [h * tokens + index, i]
      : (h, i) => [h * tokens + i, index];
    return overHeads(rows, tokens, this.network.heads, head, at);
  }

  // What the class token reads; `layer` counts `classSpecials`.
  classMap(kind, layer, head) {
    const rows = this.classRows[this.kind(kind)][layer];
    return overHeads(rows, rows.n, this.network.heads, head, (h, i) => [h, i]);
  }

  // One of the stored maps of patches alone: rollout, relevance, ...
  patchMap(number) {
    return overHeads(this.patchMaps, this.patches, 1, 0, (h, i) => [number, i]);
  }
}

// A map of n values. Of a mean, half the steps are averaged as well; of a maximum the largest counts.
function overHeads(rows, n, heads, head, at) {
  const values = new Float64Array(n), halfSteps = new Float64Array(n);
  const first = typeof head === "number" ? head : 0;
  const last = typeof head === "number" ? head + 1 : heads;
  for (let i = 0; i < n; i++) {
    let value = head === "max" ? -Infinity : 0, half = 0;
    for (let h = first; h < last; h++) {
      const [row, column] = at(h, i);
      const v = rows.value(row, column), step = rows.steps[row] / 2;
      if (head === "max") {
        value = Math.max(value, v);
        half = Math.max(half, step);
      } else {
        value += v;
        half += step;
      }
    }
    const count = head === "max" ? 1 : last - first;
    values[i] = value / count;
    halfSteps[i] = half / count;
  }
  return { values, halfSteps };
}

// Least and largest value of the last `count` (the patches), and where the largest is.
function extent(values, count) {
  const start = values.length - count;
  let low = Infinity, high = -Infinity, where = 0;
  for (let i = start; i < values.length; i++) {
    if (values[i] < low) low = values[i];
    if (values[i] > high) { high = values[i]; where = i - start; }
  }
  return { low, high, where };
}

// Decimals that tell apart what is stored: two more than the step has.
function decimals(halfStep) {
  return halfStep > 0 ? Math.min(30, Math.max(2, Math.ceil(-Math.log10(2 * halfStep)) + 2)) : 6;
}

function shown(value, halfStep) {
  const places = decimals(halfStep);
  if (places <= 8 || !value) return value.toFixed(Math.min(places, 8));
  return value.toExponential(Math.min(9, Math.max(1, places + Math.floor(Math.log10(Math.abs(value))))));
}

// Area under a curve over [0, 1] in equal steps, by the trapezoid rule.
function area(curve) {
  let sum = (curve[0] + curve[curve.length - 1]) / 2;
  for (let i = 1; i < curve.length - 1; i++) sum += curve[i];
  return sum / (curve.length - 1);
}
