// The page: state, controls, keys and the two dialogs.

const manifest = JSON.parse(document.getElementById("manifest").textContent);
const $ = (id) => document.getElementById(id);
const opened = new Map();
const state = {
  layer: 0, head: "mean", kind: "mixed_weights", direction: "reads", point: { x: 0.5, y: 0.5 }, probe: null,
  held: false, opacity: 0.7, power: 1, headMeans: manifest.headMeans,
};
let panels = [];

function openView(image, model) {
  const name = `${image}-${model}`;
  if (!opened.has(name)) {
    const stored = manifest.views.find((view) => view.image === image && view.model === model);
    const view = new View({ ...stored, imageName: manifest.images[image] }, manifest.models[model]);
    opened.set(name, view.open().then(() => view));
  }
  return opened.get(name);
}

// Drawing, at most once a frame.

let waiting = false;
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    syncControls();
    panels.forEach((panel) => panel.draw());
    announce();
  });
}

let announcing;
function announce() {
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    $("status").textContent = panels.filter((panel) => panel.view?.selfAttention)
      .map(({ part }) => `${part.caption.textContent}. ${part.reading.textContent}`).join(". ");
  }, 250);
}

function syncControls() {
  const networks = panels.map((panel) => panel.network).filter(Boolean);
  if (!networks.length) return;
  const depth = Math.max(...networks.map((network) => network.specials.length));
  const heads = state.headMeans ? 1 : Math.max(...networks.map((network) => network.heads));
  state.layer = Math.min(state.layer, depth - 1);
  $("layer").max = depth - 1;
  $("layer").value = state.layer;
  $("layer-text").textContent = `${state.layer} (0 to ${depth - 1})`;
  if ($("head").dataset.heads !== String(heads)) fillHeads(heads);
  if (typeof state.head === "number" && state.head >= heads) state.head = "mean";
  $("head").value = state.head;
  const mixed = networks.some((network) => network.kinds.length > 1);
  $("kind").hidden = !mixed;
  document.querySelector(`[name=kind][value=${mixed ? state.kind : "weights"}]`).checked = true;
  document.querySelector(`[name=direction][value=${state.direction}]`).checked = true;
  $("power").value = state.power;
  $("opacity").value = Math.round(100 * state.opacity);
}

function fillHeads(heads) {
  $("head").dataset.heads = heads;
  const options = state.headMeans ? [["mean", "mean of all"]]
    : [["mean", "mean of all"], ["max", "maximum"], ...Array.from({ length: heads }, (_, i) => [i, `head ${i}`])];
  $("head").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  $("head").disabled = options.length === 1;
}

// Panels

function fillChoices(panel) {
  for (const [kind, names] of [["model", manifest.models.map(({ name }) => name)], ["image", manifest.images]]) {
    const select = panel.part[kind];
    select.replaceChildren(...names.map((name, i) => new Option(name, i)));
    select.value = panel.choice[kind];
    select.disabled = names.length === 1;
  }
}

async function showPanels(choices) {
  panels = choices.map((choice, place) => new Panel(state, { ...choice, place }, changed));
  panels.forEach(fillChoices);
  $("panels").replaceChildren(...panels.map(({ element }) => element));
  $("panels").dataset.count = panels.length;
  await Promise.all(panels.map((panel) => panel.show()));
}

const first = { model: 0, image: 0 };
const second = manifest.models.length > 1 ? { model: 1, image: 0 } : { model: 0, image: 1 };
const canCompare = manifest.views.length > 1;

// Controls

function step(by) {
  state.layer = Math.min(Math.max(state.layer + by, 0), Number($("layer").max));
}

function stepHead(by) {
  const options = [...$("head").options].map(({ value }) => value);
  const at = options.indexOf(String(state.head));
  setHead(options[(at + by + options.length) % options.length]);
}

function setHead(value) {
  state.head = /^\d+$/.test(value) ? Number(value) : value;
}

function stepClass(by) {
  for (const panel of panels) {
    const { classes } = panel.view;
    if (!classes.length) continue;
    const at = classes.indexOf(panel.class);
    panel.choice.class = classes[(at + by + classes.length) % classes.length].index;
    panel.fillClasses();
    panel.drawCurves();
  }
}

function stepSpecial() {
  const count = Math.max(...panels.flatMap(({ network }) => network.specials));
  const next = (state.point.special ?? -1) + 1;
  state.point = next < count ? { special: next } : { x: 0.5, y: 0.5 };
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme-button").firstChild.textContent = theme === "dark" ? "Light " : "Dark ";
  changed(); // the atlases have their colours from the style
}

function hold() {
  state.held = !state.held;
  state.probe = null;
}

$("controls").addEventListener("input", ({ target }) => {
  if (target.id === "layer") state.layer = Number(target.value);
  if (target.id === "head") setHead(target.value);
  if (target.id === "power") state.power = Number(target.value);
  if (target.id === "opacity") state.opacity = Number(target.value) / 100;
  if (target.name === "kind") state.kind = target.value;
  if (target.name === "direction") state.direction = target.value;
  if (target.id === "compare") showPanels(target.checked ? [first, second] : [panels[0].choice]);
  changed();
});
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("theme-button").addEventListener("click", () => KEYS.t.act());
$("help-button").addEventListener("click", () => KEYS["?"].act());
$("numbers-button").addEventListener("click", () => KEYS.n.act());

// Keys. Arrows, Enter and Space act where a picture has the focus, or nothing has; letters wherever nothing is typed.

const flip = (name, a, b) => { state[name] = state[name] === a ? b : a; };
const moved = (down, right) => () => focusedPanel().move(down, right);
const KEYS = {
  ArrowUp: { act: moved(-1, 0), map: true }, ArrowDown: { act: moved(1, 0), map: true },
  ArrowLeft: { act: moved(0, -1), map: true }, ArrowRight: { act: moved(0, 1), map: true },
  Enter: { act: hold, map: true }, " ": { act: hold, map: true },
  PageUp: { act: () => step(-1), map: true }, PageDown: { act: () => step(1), map: true },
  Home: { act: () => step(-Infinity), map: true }, End: { act: () => step(Infinity), map: true },
  Escape: { act: () => Object.assign(state, { held: false, probe: null }) },
  "[": { act: () => step(-1) }, "]": { act: () => step(1) },
  h: { act: () => stepHead(1) }, H: { act: () => stepHead(-1) },
  m: { act: () => flip("kind", "weights", "mixed_weights") },
  r: { act: () => flip("direction", "reads", "read") },
  c: { act: () => stepClass(1) }, C: { act: () => stepClass(-1) },
  s: { act: stepSpecial },
  l: { act: () => flip("power", 1, 0.5) },
  "-": { act: () => { state.opacity = Math.max(0, state.opacity - 0.1); } },
  "+": { act: () => { state.opacity = Math.min(1, state.opacity + 0.1); } },
  t: { act: () => setTheme(isDark() ? "light" : "dark") },
  n: { act: () => openNumbers() },
  "?": { act: () => $("help").showModal() },
};
const KEY_HELP = [
  ["Arrows", "move to the next patch"], ["Enter, Space", "hold the patch, then read others"], ["Escape", "let go"],
  ["[ ]", "layer before, layer after (Page Up, Page Down)"], ["h H", "next head, head before; mean and maximum first"],
  ["m", "before or after the mixing of heads"], ["r", "what the patch reads, or who reads it"],
  ["c C", "next class, class before"], ["s", "class token and distillation token as the pointer"],
  ["l", "colours by value, or by its square root"],
  ["+ -", "more or less of the overlay"], ["n", "numbers of the map"], ["t", "dark or light"], ["?", "this list"],
];

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function focusedPanel() {
  return panels.find(({ element }) => element.contains(document.activeElement)) ?? panels[0];
}

document.addEventListener("keydown", (event) => {
  const key = KEYS[event.key];
  const at = document.activeElement;
  if (!key || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (key.map && at !== document.body && at !== $("panels") && !at.matches("canvas")) return;
  if (at.matches("select") && event.key.length === 1) return; // letters choose an option there
  event.preventDefault();
  key.act();
  changed();
});

// Numbers

function numberChoices() {
  const names = ["main", "class_attention", "rollout", "relevance", "random", "centre", "deletion", "insertion", "classes"];
  return panels.flatMap((panel, place) => names
    .filter((name) => name !== "main" || panel.view.selfAttention)
    .filter((name) => panel.class || !["relevance", "deletion", "insertion", "classes"].includes(name))
    .map((name) => [`${place}:${name}`, (panels.length > 1 ? `${place ? "Right" : "Left"}: ` : "") + numbersName(panel, name)]));
}

function numbersName(panel, name) {
  if (name === "main") return "Self-attention, as chosen";
  if (name === "classes") return "Classes and probabilities";
  if (name === "deletion" || name === "insertion") return `${name === "deletion" ? "Deletion" : "Insertion"} curves`;
  return name === "relevance" ? `Relevance for ${panel.class.word}` : METHOD_NAMES[name];
}

// The chosen numbers: what they are, the heads of columns, and lines of [head, number, number, ...].
function chosenNumbers() {
  const [place, name] = $("numbers-of").value.split(":");
  const panel = panels[Number(place)];
  const { rows, columns } = panel.network;
  if (name === "classes") {
    return {
      about: `The most probable classes and those asked for, by ${panel.network.name}.`,
      heads: ["class", "number", "probability"],
      lines: panel.view.classes.map(({ word, index, probability }) => [word, index, probability]),
      text: String,
    };
  }
  if (name === "deletion" || name === "insertion") {
    const entries = Object.entries(panel.class.curves);
    const points = entries[0][1][name].length - 1;
    return {
      about: `Probability of ${panel.class.word} after each share of the patches, in the order of each map.`,
      heads: ["patches", ...entries.map(([method]) => METHOD_NAMES[method])],
      lines: Array.from({ length: points + 1 }, (_, i) => [`${((100 * i) / points).toFixed(0)} %`, ...entries.map(([, curves]) => curves[name][i])]),
      text: (value) => value.toPrecision(4),
    };
  }
  const map = name === "main" ? panel.mainMap() : panel.methodMap(name);
  if (!map) return { about: panel.part.reading.textContent, heads: [], lines: [], text: String };
  const half = Math.max(...map.halfSteps), special = map.values.length - rows * columns;
  const sum = map.values.reduce((total, value) => total + value, 0);
  const self = panel.token.special === undefined ? patchName(panel.token.patch, columns) : `the ${panel.network.specialNames[panel.token.special]}`;
  const what = name === "main"
    ? `${panel.part.caption.textContent}: what ${self} ${state.direction === "reads" ? "reads" : "is read by"}. ` : "";
  const extra = Array.from({ length: special }, (_, i) => [panel.network.specialNames[i], map.values[i]]);
  const grid = Array.from({ length: rows }, (_, row) =>
    [`row ${row}`, ...map.values.slice(special + row * columns, special + (row + 1) * columns)]);
  return {
    about: `${what}Stored in steps of at most ${(2 * half).toPrecision(3)}, so within ±${half.toPrecision(3)} of the network's; sum ${shown(sum, half)}.`,
    heads: ["", ...Array.from({ length: columns }, (_, i) => `column ${i}`)],
    lines: [...grid, ...extra],
    text: (value) => shown(value, half),
  };
}

function openNumbers() {
  const before = $("numbers-of").value;
  const choices = numberChoices();
  $("numbers-of").replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
  if (choices.some(([value]) => value === before)) $("numbers-of").value = before;
  fillNumbers();
  $("numbers").showModal();
}

function fillNumbers() {
  const { about, heads, lines, text } = chosenNumbers();
  $("copied").textContent = "";
  $("numbers-about").textContent = about;
  $("numbers-table").replaceChildren(
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col", textContent: head.replace("column ", ""), ariaLabel: head })))),
    make("tbody", {}, ...lines.map(([head, ...values]) => make("tr", {},
      make("th", { scope: "row", textContent: head }), ...values.map((value) => make("td", { textContent: text(value), title: String(value) }))))));
}

function numbersCsv() {
  const { heads, lines } = chosenNumbers();
  const quoted = (cell) => /[",\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell;
  return [heads, ...lines].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
}

async function copyNumbers() {
  const csv = numbersCsv();
  try {
    await navigator.clipboard.writeText(csv);
  } catch { // an older browser, or a page that may not
    const area = make("textarea", { value: csv });
    $("numbers").append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("copied").textContent = "Copied.";
}

$("numbers-of").addEventListener("change", fillNumbers);
$("copy").addEventListener("click", copyNumbers);

// Start

function fail(sentence) {
  $("failure").textContent = sentence;
  $("failure").hidden = false;
}

async function start() {
  const { models, images } = manifest;
  $("subtitle").textContent = `${models.map(({ name }) => name).join(" and ")} on ${images.length === 1 ? images[0] : `${images.length} pictures`}` +
    (state.headMeans ? "; self-attention as means over heads" : "");
  $("exactness").textContent = "Every number on this page is one that is stored in it, or a mean, maximum or area of such. Stored maps lie within half of the " +
    "step shown of what the network computed; means and maxima are of the stored numbers. Layers, heads, rows and " +
    "columns are counted from 0, as by cait explain. The page asks nothing of any server.";
  $("keys").replaceChildren(...KEY_HELP.flatMap(([key, text]) => [make("dt", {}, make("kbd", { textContent: key })), make("dd", { textContent: text })]));
  $("compare-control").hidden = !canCompare;
  $("theme-button").firstChild.textContent = isDark() ? "Light " : "Dark ";
  const beside = models.length > 1;
  $("compare").checked = beside;
  await showPanels(beside ? [first, second] : [first]);
  panels[0].part.map.focus({ preventScroll: true });
  new ResizeObserver(changed).observe($("panels"));
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = Math.round(performance.now());
  }));
}

if (typeof DecompressionStream === "undefined") {
  fail("This browser cannot read compressed data (DecompressionStream); take Chrome 80, Firefox 113, Safari 16.4, or later ones.");
} else {
  start().catch((error) => fail(`This page is damaged: ${error.message}`));
}
