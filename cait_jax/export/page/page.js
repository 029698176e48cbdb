"use strict";

const $ = (id) => document.getElementById(id);
const TOP = 5;
let network, session, shown;

async function start() {
  network = await (await fetch("export.json")).json();
  $("name").textContent = network.name;
  document.title = `${network.name}: what is in this picture?`;
  ort.env.wasm.wasmPaths = new URL("ort/", document.baseURI).href;
  // Threads need headers that a plain server does not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  session = await ort.InferenceSession.create(network.files[0], { executionProviders: ["wasm"] });
  $("attention-control").hidden = !network.outputs.includes("attention");
  const [height, width] = network.preprocessing.image_size;
  for (const canvas of [$("picture"), $("attention")]) Object.assign(canvas, { height, width });
  say("Drop a picture here, choose one, or paste one.");
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

function say(text) {
  $("status").textContent = text;
}

/** The picture upright, over white, as RGBA. */
async function decode(blob) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(blob, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Crop, logits and, where the network has it, attention of an encoded picture. */
async function look(blob) {
  const { data, height, width } = await decode(blob);
  const { preprocessing } = network, [h, w] = preprocessing.image_size;
  const crop = centreCrop(data, height, width, preprocessing);
  const images = new ort.Tensor("uint8", crop, [1, h, w, preprocessing.channels]);
  const found = await session.run({ images });
  return {
    crop,
    logits: Array.from(found.logits.data),
    attention: found.attention && { data: Array.from(found.attention.data), shape: found.attention.dims.slice(1) },
  };
}

function probabilities(logits) {
  const most = Math.max(...logits), raised = logits.map((x) => Math.exp(x - most));
  const sum = raised.reduce((a, b) => a + b, 0);
  return raised.map((x) => x / sum);
}

async function classify(blob) {
  say("Looking …");
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const began = performance.now();
  try {
    shown = await look(blob);
  } catch (error) {
    say(`This picture cannot be read: ${error.message}`);
    return;
  }
  const seconds = (performance.now() - began) / 1000;
  draw();
  list(probabilities(shown.logits));
  say(`${seconds.toFixed(1)} s, in this browser; the picture stays here.`);
  document.documentElement.dataset.looked = String(1 + Number(document.documentElement.dataset.looked || 0));
}

function draw() {
  const { preprocessing } = network, [height, width] = preprocessing.image_size;
  const pixels = new ImageData(width, height), channels = preprocessing.channels;
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = shown.crop[i * channels + (channels === 1 ? 0 : c)];
    pixels.data[4 * i + 3] = 255;
  }
  $("picture").getContext("2d").putImageData(pixels, 0, 0);
  const over = $("attention").getContext("2d");
  over.clearRect(0, 0, width, height);
  if (shown.attention) {
    const { data, shape: [rows, columns] } = shown.attention;
    const most = Math.max(...data, 1e-12), small = new OffscreenCanvas(columns, rows);
    const heat = new ImageData(columns, rows);
    data.forEach((value, i) => { // dark where little is read
      heat.data[4 * i + 3] = 210 * (1 - Math.sqrt(Math.max(value, 0) / most));
    });
    small.getContext("2d").putImageData(heat, 0, 0);
    over.imageSmoothingQuality = "high";
    over.drawImage(small, 0, 0, width, height);
  }
  $("drop").classList.add("filled");
}

function list(all) {
  const words = network.class_words || all.map((_, i) => String(i));
  const order = all.map((_, i) => i).sort((a, b) => all[b] - all[a]).slice(0, TOP);
  $("classes").replaceChildren(...order.map((i) => {
    const item = document.createElement("li"), word = document.createElement("span");
    const bar = document.createElement("meter"), number = document.createElement("span");
    word.textContent = words[i];
    number.textContent = `${(100 * all[i]).toFixed(1)} %`;
    number.className = "number";
    Object.assign(bar, { min: 0, max: 1, value: all[i] });
    bar.setAttribute("aria-label", words[i]);
    item.append(word, number, bar);
    return item;
  }));
}

const first = (files) => {
  const file = Array.from(files || []).find((each) => each.type.startsWith("image/"));
  if (file && session) classify(file);
};
$("file").addEventListener("change", (event) => first(event.target.files));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") first(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => first(event.clipboardData.files));
$("show").addEventListener("change", (event) => {
  $("attention").hidden = !event.target.checked;
});
start().catch((error) => say(`The network could not be loaded: ${error.message}`));
