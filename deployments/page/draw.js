// Pictures: small SVGs that are made once and then only change their classes.

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes, parent) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

/** A grid of cells of which the first few are on: sequences of a batch, pages of a cache. */
export class Cells {
  constructor(parent, { columns, cells, label }) {
    const rows = Math.ceil(cells / columns);
    const size = 10, gap = 2;
    this.svg = svg("svg", { viewBox: `0 0 ${columns * size - gap} ${rows * size - gap}`, role: "img" }, parent);
    this.label = label;
    this.cells = [];
    this.shown = [];
    for (let i = 0; i < cells; i++) {
      const at = { x: (i % columns) * size, y: Math.floor(i / columns) * size };
      this.cells.push(svg("rect", { ...at, width: size - gap, height: size - gap, rx: 1.5, class: "cell" }, this.svg));
    }
  }

  /** `shares` are [class, share of all cells] in order; anything above zero shows at least one cell. */
  show(shares, text) {
    this.svg.setAttribute("aria-label", `${this.label}: ${text}`);
    const classes = [];
    for (const [name, share] of shares) {
      const count = share > 0 ? Math.max(1, Math.round(Math.min(share, 1) * this.cells.length)) : 0;
      for (let i = 0; i < count && classes.length < this.cells.length; i++) classes.push(`cell ${name}`);
    }
    this.cells.forEach((cell, i) => {
      const wanted = classes[i] ?? "cell";
      if (this.shown[i] !== wanted) cell.setAttribute("class", (this.shown[i] = wanted));
    });
  }
}

/** The last values of a number, from zero up. */
export class Spark {
  constructor(parent, length = 60) {
    this.length = length;
    this.values = [];
    this.svg = svg("svg", { viewBox: `0 0 ${length - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" }, parent);
    this.area = svg("path", { class: "spark-area" }, this.svg);
    this.line = svg("path", { class: "spark" }, this.svg);
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.length) this.values.shift();
    const top = Math.max(...this.values, 1e-9), left = this.length - this.values.length;
    const points = this.values.map((v, i) => `${left + i} ${(19 - (v / top) * 17).toFixed(2)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${left} 20L${points.join("L")}L${this.length - 1} 20Z`);
  }
}

/** Many replicas in little room: a tile each, filled from below by the share of its pages in use. */
export class Tiles {
  constructor(parent) {
    this.svg = svg("svg", { class: "tiles", role: "img" }, parent);
  }

  show(replicas, text) {
    const size = 16, gap = 4, columns = 40, inner = size - gap;
    const rows = Math.ceil(replicas.length / columns);
    this.svg.setAttribute("viewBox", `-1 -1 ${columns * size - gap + 2} ${rows * size - gap + 2}`);
    this.svg.setAttribute("aria-label", text);
    this.svg.replaceChildren();
    replicas.forEach((replica, i) => {
      const x = (i % columns) * size, y = Math.floor(i / columns) * size, high = inner * replica.usage;
      const tile = svg("g", {}, this.svg);
      svg("title", {}, tile).textContent = replica.title;
      svg("rect", { x, y, width: inner, height: inner, rx: 2, class: "tile-ground" }, tile);
      if (high > 0) svg("rect", { x, y: y + inner - high, width: inner, height: high, rx: 1, class: "tile" }, tile);
      const frame = replica.state === "ready" ? (replica.waiting ? "tile-wait" : "") : `tile-${replica.state}`;
      if (frame) svg("rect", { x, y, width: inner, height: inner, rx: 2, class: frame }, tile);
    });
  }
}

/** How busy each expert is, against the mean of its layer: a pixel each, which CSS makes large. */
export function heatMap(canvas, tokens) {
  const rows = tokens.length, columns = tokens[0]?.length ?? 0;
  if (!rows || !columns) return;
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.height = `${Math.min(Math.max(rows * 7, 24), 420)}px`;
  const [r, g, b] = colour(canvas);
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  tokens.forEach((layer, y) => {
    const mean = layer.reduce((a, n) => a + n, 0) / columns;
    layer.forEach((n, x) => {
      const strength = mean ? Math.min(n / mean / 2.5, 1) : 0;
      image.data.set([r, g, b, Math.round(255 * strength)], 4 * (y * columns + x));
    });
  });
  context.putImageData(image, 0, 0);
}

function colour(element) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(element).getPropertyValue("--accent").trim();
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
}
