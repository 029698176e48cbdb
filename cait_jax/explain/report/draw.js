// Colours, and maps, atlases and curves on canvases and as SVG.

// Viridis at seventeen places (Smith and van der Walt, CC0), and blue - grey - red for values with a sign.
const VIRIDIS = ["440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c",
  "1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"];
const DIVERGING = ["0d3b7a", "1f5fa8", "3f86c4", "74aed8", "aacfe6", "d4e3ec", "efefef", "f5dccf", "f2b99d",
  "e48f6e", "cf6048", "b0322f", "7f0f22"];

// 256 colours, red, green and blue in one list.
function colourTable(stops) {
  const rgb = stops.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const table = new Uint8ClampedArray(3 * 256);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (rgb.length - 1), below = Math.min(Math.floor(place), rgb.length - 2);
    for (let c = 0; c < 3; c++) {
      table[3 * i + c] = rgb[below][c] + (place - below) * (rgb[below + 1][c] - rgb[below][c]);
    }
  }
  return table;
}
const SEQUENTIAL_TABLE = colourTable(VIRIDIS), DIVERGING_TABLE = colourTable(DIVERGING);
const NEGATIVE_TABLE = colourTable(DIVERGING.slice(0, 7));

// From values to colours: from the least to the largest, or with both signs even on both sides of 0.
// `power` 1 is linear; below 1 it tells small values apart.
function colourScale(low, high, power = 1) {
  if (low < 0 && high <= 0) return { low, high, power, table: NEGATIVE_TABLE };
  if (low < 0) {
    const most = Math.max(-low, high);
    return { low: -most, high: most, power, table: DIVERGING_TABLE };
  }
  return { low, high, power, table: SEQUENTIAL_TABLE };
}

// The place of a value in its table, 0 to 1, and how far it is from nothing, 0 to 1.
function placeOf(value, { low, high, power, table }) {
  if (!(high > low)) return [0, 0];
  if (table === NEGATIVE_TABLE) {
    const strength = ((high - value) / (high - low)) ** power;
    return [1 - strength, strength];
  }
  if (table === SEQUENTIAL_TABLE) {
    const strength = ((value - low) / (high - low)) ** power;
    return [strength, strength];
  }
  const strength = (Math.abs(value) / high) ** power;
  return [0.5 + (Math.sign(value) * strength) / 2, strength];
}

// Where the photograph shows through, it does so most where a map has little to show.
function paint(pixels, at, value, scale, opacity = 1) {
  const [place, strength] = placeOf(value, scale);
  const least = 0.3 + 0.7 * opacity ** 4;
  const colour = 3 * Math.round(255 * place);
  for (let c = 0; c < 3; c++) pixels[at + c] = scale.table[colour + c];
  pixels[at + 3] = 255 * opacity * (least + (1 - least) * strength);
}

const scratch = document.createElement("canvas");

// The last rows * columns values as a small picture, one pixel a patch.
function mapPicture(values, rows, columns, scale, opacity = 1) {
  scratch.width = columns;
  scratch.height = rows;
  const context = scratch.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(columns, rows);
  const start = values.length - rows * columns;
  for (let i = 0; i < rows * columns; i++) paint(image.data, 4 * i, values[start + i], scale, opacity);
  context.putImageData(image, 0, 0);
  return scratch;
}

// Sizes a canvas's store for the screen it is on; false while it has no size.
function fit(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (!w || !h) return null;
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.imageSmoothingEnabled = false;
  return context;
}

// A map over its photograph, which shows through.
function drawOverlay(canvas, values, rows, columns, scale, opacity) {
  const { width, height } = canvas.getBoundingClientRect();
  const context = fit(canvas, width, height);
  if (!context || !values) return;
  context.drawImage(mapPicture(values, rows, columns, scale, opacity), 0, 0, width, height);
}

// The frame of a patch, dark within light, so that it shows on every colour.
function frame(canvas, rows, columns, patch, held) {
  const { width, height } = canvas.getBoundingClientRect();
  const context = canvas.getContext("2d");
  const [w, h] = [width / columns, height / rows];
  const [x, y] = [(patch % columns) * w, Math.floor(patch / columns) * h];
  context.lineWidth = 4;
  context.strokeStyle = "#fff";
  context.strokeRect(x, y, w, h);
  context.lineWidth = held ? 2.5 : 1.5;
  context.strokeStyle = held ? "#d6246e" : "#111";
  context.strokeRect(x, y, w, h);
}

function drawBar(canvas, scale) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < 256; x++) {
      paint(image.data, 4 * (y * 256 + x), scale.low + (x / 255) * (scale.high - scale.low || 1), scale);
    }
  }
  context.putImageData(image, 0, 0);
}

// How an atlas lies: a line of cells for each layer and a column for each head; of one head, layers in lines.
function atlasLayout(width, layers, heads) {
  const label = 22, gap = 3;
  const columns = heads > 1 ? heads : Math.max(1, Math.min(layers, Math.floor((width - label) / 52), 6));
  const lines = heads > 1 ? layers : Math.ceil(layers / columns);
  const cell = Math.max(16, Math.min(56, Math.floor((width - label) / columns) - gap));
  return {
    label, gap, columns, lines, cell, heads,
    width: label + columns * (cell + gap), height: 14 + lines * (cell + gap),
    place: (layer, head) => heads > 1 ? [head, layer] : [layer % columns, Math.floor(layer / columns)],
    find(x, y) {
      const column = Math.floor((x - label) / (cell + gap)), line = Math.floor((y - 14) / (cell + gap));
      if (column < 0 || column >= columns || line < 0 || line >= lines) return null;
      const [layer, head] = heads > 1 ? [line, column] : [line * columns + column, 0];
      return layer < layers ? { layer, head } : null;
    },
  };
}

// Every layer and head at once; each cell has its own colours.
function drawAtlas(canvas, layout, layers, rows, columns, mapOf, chosen, power) {
  canvas.style.width = canvas.closest("figure").style.width = `${layout.width}px`;
  canvas.style.height = `${layout.height}px`;
  const context = fit(canvas, layout.width, layout.height);
  if (!context) return;
  const style = getComputedStyle(canvas);
  context.font = `10px ${style.fontFamily}`;
  context.fillStyle = style.color;
  context.textBaseline = "middle";
  const pitch = layout.cell + layout.gap;
  for (let i = 0; layout.heads > 1 && i < layout.columns; i++) {
    context.textAlign = "center";
    context.fillText(String(i), layout.label + i * pitch + layout.cell / 2, 6);
  }
  for (let line = 0; line < layout.lines; line++) {
    context.textAlign = "right";
    const first = layout.heads > 1 ? line : line * layout.columns;
    context.fillText(String(first), layout.label - 5, 14 + line * pitch + layout.cell / 2);
  }
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < layout.heads; head++) {
      const [column, line] = layout.place(layer, head);
      const [x, y] = [layout.label + column * pitch, 14 + line * pitch];
      const map = mapOf(layer, head);
      if (!map) continue;
      const { low, high } = extent(map.values, rows * columns);
      const height = Math.min(layout.cell, (layout.cell * rows) / columns);
      const width = (height * columns) / rows;
      context.drawImage(mapPicture(map.values, rows, columns, colourScale(low, high, power)), x, y, width, height);
      if (layer === chosen.layer && (chosen.head === head || layout.heads === 1 || typeof chosen.head === "string")) {
        context.lineWidth = 2;
        context.strokeStyle = style.getPropertyValue("--accent");
        context.strokeRect(x - 1, y - 1, width + 2, height + 2);
      }
    }
  }
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Curves of a probability over the share of patches; `lines` is [name, curve] in the order of the classes l0, l1, ...
function curvesPicture(title, lines) {
  const [width, height, left, right, top, bottom] = [320, 190, 34, 8, 10, 30];
  const highest = Math.max(...lines.flatMap(([, curve]) => curve));
  const most = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((m) => m >= highest) ?? 1;
  const x = (f) => left + f * (width - left - right), y = (p) => height - bottom - (p / most) * (height - top - bottom);
  const grid = [0, 0.5, 1].flatMap((part) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(part * most), y2: y(part * most) }),
    svg("text", { class: "tick", x: left - 5, y: y(part * most) + 3.5, "text-anchor": "end" }, String(+(part * most).toPrecision(3))),
    svg("text", { class: "tick", x: x(part), y: height - bottom + 14, "text-anchor": part === 1 ? "end" : "middle" }, `${100 * part} %`),
  ]);
  const paths = lines.map(([name, curve], i) => svg("polyline", {
    class: `line l${i}`, "data-name": name,
    points: curve.map((p, at) => `${x(at / (curve.length - 1)).toFixed(1)},${y(p).toFixed(1)}`).join(" "),
  }));
  const areas = lines.map(([name, curve]) => `${name} ${area(curve).toFixed(3)}`).join(", ");
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. Areas: ${areas}` }, ...grid,
    svg("text", { class: "tick", x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "of the patches"),
    ...paths);
}
