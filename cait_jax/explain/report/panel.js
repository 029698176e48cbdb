// One network and one picture: the map under the pointer, every layer and head, and what counts for a class.

const METHOD_NAMES = {
  class_attention: "Class attention", rollout: "Rollout", relevance: "Relevance", random: "Random order", centre: "Centre first",
};

function patchName(patch, columns) {
  return `patch ${patch} (row ${Math.floor(patch / columns)}, column ${patch % columns})`;
}

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

class Panel {
  // `state` is shared by the panels; `onChange` is called when one of them changed it.
  constructor(state, choice, onChange) {
    Object.assign(this, { state, choice, onChange });
    const content = document.getElementById("panel").content.cloneNode(true);
    this.element = content.firstElementChild;
    this.part = {};
    for (const part of this.element.querySelectorAll("[data-part]")) this.part[part.dataset.part] = part;
    this.listen();
  }

  listen() {
    const { map } = this.part;
    map.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.point(event));
    map.addEventListener("pointerleave", () => {
      if (this.state.held) this.state.probe = null;
      this.onChange();
    });
    map.addEventListener("click", (event) => {
      if (event.pointerType !== "touch" || this.pointsAt(event)) {
        this.state.held = !this.state.held; // a finger holds, and lets go of, the patch by a second tap
        this.state.probe = null;
      }
      this.point(event);
    });
    for (const direction of ["reads", "read"]) {
      const canvas = this.part[`atlas-${direction}`];
      canvas.addEventListener("click", (event) => {
        const cell = this.layout?.find(event.offsetX, event.offsetY);
        if (!cell) return;
        Object.assign(this.state, { layer: cell.layer, direction });
        if (this.network.heads > 1) this.state.head = cell.head;
        this.onChange();
      });
    }
    for (const kind of ["model", "image"]) {
      this.part[kind].addEventListener("change", () => {
        this.choice[kind] = Number(this.part[kind].value);
        this.show();
      });
    }
  }

  place(event) {
    const box = this.part.map.getBoundingClientRect();
    const inside = (v) => Math.min(Math.max(v, 0), 0.9999);
    return { x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) };
  }

  pointsAt(event) {
    return this.token.patch === this.cell(this.place(event));
  }

  point(event) {
    const at = this.place(event);
    if (this.state.held) this.state.probe = at;
    else this.state.point = at;
    this.onChange();
  }

  // Moves the pointer, or while a patch is held the probe, by patches of this panel.
  move(down, right) {
    const { rows, columns } = this.network, { state } = this;
    const from = state.held ? state.probe ?? state.point : state.point;
    const old = from.special === undefined ? this.cell(from) : 0;
    const row = Math.min(Math.max(Math.floor(old / columns) + down, 0), rows - 1);
    const column = Math.min(Math.max((old % columns) + right, 0), columns - 1);
    state[state.held ? "probe" : "point"] = { x: (column + 0.5) / columns, y: (row + 0.5) / rows };
  }

  cell({ x, y }) {
    const { rows, columns } = this.network;
    return Math.floor(y * rows) * columns + Math.floor(x * columns);
  }

  get token() {
    const { point } = this.state;
    return point.special === undefined ? { patch: this.cell(point) } : point;
  }

  get layer() {
    return Math.min(this.state.layer, this.view.depth - 1);
  }

  // The chosen head, where this network has it; of head means there is but one.
  get head() {
    const { head } = this.state;
    if (this.network.heads === 1 && this.state.headMeans) return 0;
    return typeof head === "number" && head >= this.network.heads ? "mean" : head;
  }

  get headName() {
    if (this.state.headMeans) return `mean of ${this.network.allHeads} heads`;
    const { head, network } = this;
    const missing = head !== this.state.head ? `, as there is no head ${this.state.head}` : "";
    return typeof head === "number" ? `head ${head}` : `${head} of ${network.heads} heads${missing}`;
  }

  get class() {
    const { classes } = this.view;
    return classes.find(({ index }) => index === this.choice.class) ?? classes[0];
  }

  async show() {
    this.element.setAttribute("aria-busy", "true");
    this.view = await openView(this.choice.image, this.choice.model);
    this.network = this.view.network;
    this.classMapLayer = this.network.classAttention ? 0 : this.network.classSpecials.length - 1;
    const name = this.view.imageName;
    this.element.setAttribute("aria-label", `${name} seen by ${this.network.name}`);
    this.part.photograph.src = this.view.photograph;
    this.part.photograph.alt = `${name}, as the network sees it`;
    this.element.style.setProperty("--aspect", `${this.network.imageSize[1]} / ${this.network.imageSize[0]}`);
    const absent = !this.view.selfAttention;
    this.part.absent.hidden = !absent;
    this.part.absent.textContent = "The self-attention of this picture was not kept: name it by --self-attention when the report is made.";
    this.element.classList.toggle("without-attention", absent);
    this.fillSpecials();
    this.fillClasses();
    this.fillMethods();
    this.drawCurves();
    this.element.removeAttribute("aria-busy");
    this.onChange();
  }

  fillSpecials() {
    const count = Math.max(...this.network.specials);
    this.part.specials.hidden = !count;
    this.specials = this.network.specialNames.slice(0, count).map((name, special) => {
      const value = make("output");
      const button = make("button", { type: "button" }, name, value);
      button.addEventListener("click", () => {
        this.state.point = this.state.point.special === special ? { x: 0.5, y: 0.5 } : { special };
        this.onChange();
      });
      return { button, value };
    });
    this.part.specials.replaceChildren(...this.specials.map(({ button }) => button));
  }

  fillClasses() {
    const group = `class-${this.choice.place}`;
    const lines = this.view.classes.map(({ index, word, probability }) => {
      const radio = make("input", { type: "radio", name: group, value: index, checked: index === this.class.index });
      radio.addEventListener("change", () => {
        this.choice.class = index;
        this.drawCurves();
        this.onChange();
      });
      const bar = make("span", { className: "bar" });
      bar.style.width = `${100 * probability}%`;
      return make("label", {}, radio, make("span", { className: "word", textContent: word, title: word }),
        make("span", { className: "track" }, bar), make("span", { className: "number", textContent: percent(probability), title: String(probability) }));
    });
    this.part.classes.replaceChildren(this.part.classes.firstElementChild, ...lines);
    this.part.classes.hidden = !lines.length;
  }

  // The cards of class attention, rollout and, where there are classes, relevance.
  fillMethods() {
    const layers = this.network.classSpecials.length;
    const names = ["class_attention", "rollout", ...(this.class ? ["relevance"] : [])];
    this.cards = names.map((method) => {
      const canvas = make("canvas", { ariaHidden: "true" });
      const title = make("h3", { textContent: METHOD_NAMES[method] });
      const about = make("p", { className: "about" }), areas = make("p", { className: "areas" });
      const photograph = make("img", { src: this.view.photograph, alt: "" });
      const element = make("article", {}, title, make("div", { className: "stage" }, photograph, canvas), about, areas);
      if (method === "class_attention" && layers > 1) {
        const slider = make("input", { type: "range", min: 0, max: layers - 1, step: 1, value: this.classMapLayer, ariaLabel: "Block of class attention" });
        slider.addEventListener("input", () => {
          this.classMapLayer = Number(slider.value);
          this.onChange();
        });
        element.insertBefore(slider, areas);
      }
      return { method, canvas, about, areas };
    });
    this.part.methods.replaceChildren(...this.cards.map(({ canvas }) => canvas.closest("article")));
  }

  methodMap(method) {
    if (method === "class_attention") return this.view.classMap(this.state.kind, this.classMapLayer, this.head);
    const number = { rollout: 1, random: 2, centre: 3 }[method] ?? this.class.map;
    return this.view.patchMap(number);
  }

  mainMap() {
    return this.view.tokenMap(this.state.kind, this.layer, this.head, this.state.direction, this.token);
  }

  draw() {
    if (!this.view) return;
    if (this.view.selfAttention) {
      this.drawMain();
      this.drawAtlases();
    } else {
      fit(this.part.map, 1, 1);
    }
    this.drawMethods();
  }

  drawMain() {
    const { rows, columns, specials } = this.network, { state, part, token } = this;
    const map = this.mainMap();
    const mixing = this.network.kinds.length > 1 ? `, ${this.view.kind(state.kind) === "weights" ? "before" : "after"} mixing` : "";
    part.caption.textContent = `Layer ${this.layer}, ${this.headName}${mixing}`;
    this.specials.forEach(({ button, value }, special) => {
      const there = map && special < specials[this.layer];
      value.textContent = there ? shown(map.values[special], map.halfSteps[special]) : "–";
      button.setAttribute("aria-pressed", String(token.special === special));
    });
    part.map.setAttribute("aria-label", `Self-attention over ${this.view.imageName}. ${part.caption.textContent}`);
    if (!map) {
      drawOverlay(part.map, null);
      part.reading.textContent = `The ${this.network.specialNames[token.special]} is not in this layer.`;
      part.low.textContent = part.high.textContent = part.step.textContent = "";
      return;
    }
    const { low, high } = extent(map.values, rows * columns);
    const scale = colourScale(low, high, state.power);
    drawOverlay(part.map, map.values, rows, columns, scale, state.opacity);
    if (token.patch !== undefined) frame(part.map, rows, columns, token.patch, state.held);
    if (state.probe) frame(part.map, rows, columns, this.cell(state.probe), false);
    drawBar(part.bar, scale);
    const half = Math.max(...map.halfSteps);
    part.low.textContent = shown(scale.low, half);
    part.high.textContent = shown(scale.high, half);
    part.reading.textContent = this.reading(map);
    part.step.textContent = `Least ${shown(low, half)}, largest ${shown(high, half)}. Stored in steps of ${(2 * half).toPrecision(2)}` +
      `, so within ±${half.toPrecision(2)} of the network's.`;
  }

  // What the pointer, or the probe, is on.
  reading(map) {
    const { columns, rows } = this.network, { state, token } = this;
    const self = token.special === undefined ? patchName(token.patch, columns) : `the ${this.network.specialNames[token.special]}`;
    const verb = state.direction === "reads" ? "reads" : "is read by";
    const { where } = extent(map.values, rows * columns);
    const target = state.probe ? this.cell(state.probe) : where;
    const at = map.values.length - rows * columns + target;
    const value = `${shown(map.values[at], map.halfSteps[at])} ± ${map.halfSteps[at].toPrecision(1)}`;
    const text = `${self} ${verb} ${state.probe ? "" : "most "}${patchName(target, columns)}: ${value}`;
    return text[0].toUpperCase() + text.slice(1);
  }

  drawAtlases() {
    const { network, view, state, token } = this;
    const room = this.element.querySelector(".atlases").clientWidth;
    const beside = atlasLayout((room - 24) / 2, view.depth, network.heads);
    this.layout = 2 * beside.width + 24 <= room ? beside : atlasLayout(room, view.depth, network.heads);
    for (const direction of ["reads", "read"]) {
      const canvas = this.part[`atlas-${direction}`];
      const mapOf = (layer, head) => view.tokenMap(state.kind, layer, head, direction, token);
      const chosen = direction === state.direction ? { layer: this.layer, head: this.head } : {};
      drawAtlas(canvas, this.layout, view.depth, network.rows, network.columns, mapOf, chosen, state.power);
      canvas.setAttribute("aria-label", `${direction === "reads" ? "What the patch reads" : "Who reads the patch"} in every layer ` +
        `(lines) and head (columns); layer and head are chosen by [ ] and h`);
    }
    // Evidence goes beside a tall atlas, and below a low one.
    this.element.classList.toggle("low", this.layout.height < this.element.querySelector(".main").offsetHeight + 120);
    for (const axes of this.element.querySelectorAll(".axes")) {
      axes.textContent = network.heads > 1 ? "layers down, heads across" : "layer by layer";
    }
  }

  drawMethods() {
    const { rows, columns } = this.network, { state } = this;
    for (const { method, canvas, about, areas } of this.cards) {
      const map = this.methodMap(method);
      const { low, high } = extent(map.values, rows * columns);
      drawOverlay(canvas, map.values, rows, columns, colourScale(low, high, state.power), state.opacity);
      const { patch } = this.token;
      const half = Math.max(...map.halfSteps);
      const range = `${shown(low, half)} to ${shown(high, half)}`;
      if (patch !== undefined) frame(canvas, rows, columns, patch, state.held);
      const at = map.values.length - rows * columns + (patch ?? 0);
      const here = patch === undefined ? "" : `; here ${shown(map.values[at], map.halfSteps[at])}`;
      const what = method !== "class_attention" ? ""
        : `${this.network.classAttention ? "Class block" : "Layer"} ${this.classBlock()}, ${this.headName}. `;
      about.textContent = `${what}${range}${here}`;
      const curves = this.class?.curves[method];
      areas.textContent = curves
        ? `Deletion ${area(curves.deletion).toFixed(3)}, insertion ${area(curves.insertion).toFixed(3)}` +
          (method === "class_attention" ? `, of ${this.network.classAttention ? "class block 0" : "the last layer"}, mean of heads` : "")
        : "";
    }
  }

  classBlock() {
    const { classAttention, classSpecials, specials } = this.network;
    const first = classAttention ? 0 : specials.length - classSpecials.length;
    return `${first + this.classMapLayer}`;
  }

  drawCurves() {
    const chosen = this.class;
    if (!chosen) return this.part.curves.replaceChildren();
    const methods = ["class_attention", "rollout", "relevance", "random", "centre"].filter((name) => chosen.curves[name]);
    const figure = (curve, title, better) => make("figure", {}, make("figcaption", {}, make("b", { textContent: title }), ` ${better}`),
      curvesPicture(`${title}, probability of ${chosen.word}`, methods.map((name) => [METHOD_NAMES[name], chosen.curves[name][curve]])));
    const head = make("tr", {}, ...["Order of patches", "Deletion", "Insertion"].map((text) => make("th", { scope: "col", textContent: text })));
    const lines = methods.map((name, i) => make("tr", {},
      make("th", { scope: "row" }, make("span", { className: `key l${i}` }), METHOD_NAMES[name]),
      ...["deletion", "insertion"].map((curve) => make("td", { textContent: area(chosen.curves[name][curve]).toFixed(3) }))));
    const table = make("table", {}, make("caption", { textContent: `Areas under the probability of ${chosen.word}` }), make("thead", {}, head), make("tbody", {}, ...lines));
    this.part.curves.replaceChildren(
      figure("deletion", "Deletion", "patches taken away, most important first: low is good"),
      figure("insertion", "Insertion", "patches put back into a blurred picture: high is good"), table);
  }
}

function percent(probability) {
  return probability >= 0.0005 ? `${(100 * probability).toFixed(1)} %` : "<0.1 %";
}
