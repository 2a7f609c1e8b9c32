// The live state: asks for /state once a second while the page is visible, and draws it.
import { Cells, Spark, Tiles, heatMap } from "./draw.js";

const $ = (id) => document.getElementById(id);
const PERIOD_MS = 1000;
const LARGE = 64; // replicas; a larger cluster is asked less often
const ROWS = 16; // replicas of a pool; more of them become tiles
const EXPERTS_EVERY = 5; // updates
const WINDOW_MS = 60_000; // of the latencies shown

export function startState({ authorization }) {
  const view = new View();
  const public_ = { model: null, refresh };
  let count = 0, timer = 0, asking = false;

  async function refresh() {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    let pause = PERIOD_MS;
    try {
      const query = count++ % EXPERTS_EVERY ? "" : "?experts=1";
      const response = await fetch(`state${query}`, { headers: authorization(), cache: "no-store" });
      if (response.ok) {
        const state = await response.json();
        public_.model = state.model.name;
        view.show(state);
        const replicas = state.pools.reduce((n, pool) => n + pool.replicas.length, 0);
        if (replicas > LARGE) pause *= 3;
      } else {
        pause *= 5;
        view.fail(reason(response.status));
      }
    } catch {
      pause *= 2;
      view.fail({ pill: "Unreachable", text: "The server does not answer. Trying again." });
    }
    asking = false;
    timer = setTimeout(refresh, pause);
  }

  document.addEventListener("visibilitychange", refresh);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.repaint());
  refresh();
  return public_;
}

function reason(status) {
  if (status === 401 || status === 403) {
    return { pill: "Key needed", text: "The server shows its state to those with an API key: enter one under Settings." };
  }
  if (status === 404) return { pill: "State off", text: "This server does not show its state (observability.state is off)." };
  return { pill: "Error", text: `The server answered ${status} instead of its state. Trying again.` };
}

class View {
  constructor() {
    this.pools = new Map();
    this.rates = new Map(); // replica id -> totals at an earlier time
    this.latencies = []; // [{time, ingress, latency}]
    this.figures = new Map();
    this.maps = new Map();
    this.experts = null;
  }

  show(state) {
    const now = performance.now();
    this.latencies.push({ time: now, ingress: state.ingress, latency: state.latency });
    this.latencies = this.latencies.filter((entry) => now - entry.time < WINDOW_MS);
    for (const pool of state.pools) for (const replica of pool.replicas) this.addSpeed(replica, now);
    const replicas = state.pools.flatMap((pool) => pool.replicas);
    const ready = replicas.filter((replica) => replica.state === "ready");
    setText($("model"), state.model.name);
    document.title = `${state.model.name} · Dibit`;
    this.status(replicas, ready, state.held);
    this.showFigures(ready);
    this.showPools(state.pools);
    if (state.experts) {
      this.experts = state.experts;
      this.repaint();
    }
    setText($("updated"), `as of ${new Date().toLocaleTimeString()}`);
  }

  status(replicas, ready, held) {
    const pill = $("status"), others = replicas.length - ready.length;
    if (!ready.length) {
      const lost = replicas.length ? "None of its engines takes requests now" : "No engine is running";
      const waiting = held ? ` ${plural(held, "request")} waiting for one.` : "";
      this.banner(`${lost}. Nothing can be answered until one has started.${waiting}`);
      setText(pill, "No engine");
      pill.dataset.state = "bad";
      return;
    }
    this.banner("");
    setText(pill, others ? `${ready.length} of ${replicas.length} engines ready` : plural(ready.length, "engine") + " ready");
    pill.dataset.state = others ? "wait" : "good";
  }

  fail({ pill, text }) {
    this.banner(text);
    setText($("status"), pill);
    $("status").dataset.state = "bad";
  }

  banner(text) {
    setText($("banner"), text);
    $("banner").hidden = !text;
  }

  /** Tokens a second, from the difference of an engine's totals. */
  addSpeed(replica, now) {
    const load = replica.load;
    if (!load) return;
    const before = this.rates.get(replica.id);
    const seconds = before ? (now - before.time) / 1000 : 0;
    if (before && seconds < 0.3) {
      replica.speed = before.speed;
      return;
    }
    const rate = (name) => Math.max(0, load[name] - before[name]) / seconds;
    if (before) replica.speed = { decode: rate("decode_tokens"), prefill: rate("prefill_tokens") };
    this.rates.set(replica.id, { ...load, time: now, speed: replica.speed });
  }

  showFigures(ready) {
    const loads = ready.map((replica) => replica.load).filter(Boolean);
    const sum = (name) => loads.reduce((total, load) => total + load[name], 0);
    const speed = (name) => ready.reduce((total, replica) => total + (replica.speed?.[name] ?? 0), 0);
    const running = sum("running"), waiting = sum("waiting"), blocks = sum("total_blocks"), queried = sum("queried_tokens");
    const known = !ready.length || ready.some((replica) => replica.speed); // a speed needs two looks at the totals
    this.figure("decode", "Tokens out", known ? number(speed("decode")) : "–", "/s", speed("decode"), known);
    this.figure("prefill", "Tokens in", known ? number(speed("prefill")) : "–", "/s", speed("prefill"), known);
    this.figure("running", "Running", number(running), waiting ? `${number(waiting)} waiting` : "", running + waiting);
    const ttft = this.quantiles("ttft", [0.5, 0.95]);
    this.figure("ttft", "First token, median", ttft ? time(ttft[0]) : "–", ttft ? `p95 ${time(ttft[1])}` : "");
    const usage = blocks ? 1 - sum("free_blocks") / blocks : 0;
    this.figure("kv", "KV pages in use", percent(usage), "", usage);
    this.figure("prefix", "Prompt from cache", queried ? percent(sum("cached_tokens") / queried) : "–", "");
  }

  figure(key, title, value, note, history, known = true) {
    let figure = this.figures.get(key);
    if (!figure) {
      const element = make($("figures"), "div", "figure");
      setText(make(element, "dt"), title);
      const dd = make(element, "dd");
      figure = { value: make(dd, "span"), note: make(dd, "small"), spark: history === undefined ? null : new Spark(make(element, "dd")) };
      this.figures.set(key, figure);
    }
    setText(figure.value, value);
    setText(figure.note, note ? ` ${note}` : "");
    if (known) figure.spark?.push(history);
  }

  /** Quantiles of what came in the last minute at the ingress that answered, from the bounds of its buckets. */
  quantiles(name, shares) {
    const last = this.latencies.at(-1);
    const first = this.latencies.find((entry) => entry.ingress === last.ingress);
    const { bounds, counts } = last.latency[name] ?? { bounds: [], counts: [] };
    let recent = counts.map((n, i) => n - first.latency[name].counts[i]);
    let total = recent.reduce((a, n) => a + n, 0);
    if (!total) [recent, total] = [counts, counts.reduce((a, n) => a + n, 0)];
    if (!total) return null;
    return shares.map((share) => {
      let seen = 0;
      for (let i = 0; i < recent.length; i++) {
        if (recent[i] && seen + recent[i] >= share * total) {
          const low = i ? bounds[i - 1] : 0, high = bounds[i] ?? bounds.at(-1);
          return low + ((share * total - seen) / recent[i]) * (high - low);
        }
        seen += recent[i];
      }
      return bounds.at(-1);
    });
  }

  showPools(pools) {
    const names = new Set(pools.map((pool) => pool.name));
    for (const [name, pool] of this.pools) {
      if (!names.has(name)) {
        pool.element.remove();
        this.pools.delete(name);
      }
    }
    for (const pool of pools) {
      if (!this.pools.has(pool.name)) this.pools.set(pool.name, new Pool($("pools"), pool.name));
      this.pools.get(pool.name).show(pool.replicas);
    }
    const live = new Set(pools.flatMap((pool) => pool.replicas.map((replica) => replica.id)));
    for (const id of this.rates.keys()) if (!live.has(id)) this.rates.delete(id);
  }

  /** Draw the experts, again when the colours change. */
  repaint() {
    const pools = Object.entries(this.experts ?? {}).filter(([, { tokens }]) => tokens.length);
    $("experts").hidden = !pools.length;
    for (const [name, map] of this.maps) {
      if (!pools.some(([pool]) => pool === name)) {
        map.element.remove();
        this.maps.delete(name);
      }
    }
    for (const [name, { tokens }] of pools) {
      if (!this.maps.has(name)) {
        const element = make($("expert-maps"), "div", "map");
        const head = make(element, "div", "head");
        setText(make(head, "h3"), name);
        const canvas = make(element, "canvas");
        canvas.setAttribute("role", "img");
        this.maps.set(name, { element, text: make(head, "p", "muted"), canvas });
      }
      const map = this.maps.get(name), busiest = Math.max(...tokens.map(imbalance));
      const text = `${tokens.length} layers × ${tokens[0].length} experts, the busiest has ${busiest.toFixed(1)} times its layer's mean`;
      setText(map.text, text);
      map.canvas.setAttribute("aria-label", `Load of the experts of pool ${name}: ${text}`);
      heatMap(map.canvas, tokens);
    }
  }
}

class Pool {
  constructor(parent, name) {
    this.element = make(parent, "section", "pool");
    this.element.dataset.pool = name;
    const head = make(this.element, "div", "head");
    setText(make(head, "h3"), name);
    this.summary = make(head, "p", "muted");
    this.none = make(this.element, "p", "none");
    this.rows = make(this.element, "div");
    this.replicas = new Map();
    this.tiles = null;
  }

  show(replicas) {
    const ready = replicas.filter((replica) => replica.state === "ready").length;
    const speed = replicas.reduce((total, replica) => total + (replica.speed?.decode ?? 0), 0);
    const draining = replicas.filter((replica) => replica.state === "draining").length;
    const parts = [`${ready} of ${plural(replicas.length, "replica")} ready`];
    if (draining) parts.push(`${draining} draining`);
    parts.push(`${number(speed)} tokens/s`);
    setText(this.summary, replicas.length ? parts.join(" · ") : "");
    setText(this.none, replicas.length ? "" : "No engine here right now.");
    this.none.hidden = replicas.length > 0;
    const many = replicas.length > ROWS;
    this.rows.hidden = many;
    this.showTiles(many ? replicas : [], parts.join(", "));
    this.showRows(many ? [] : replicas);
  }

  showRows(replicas) {
    const live = new Set(replicas.map((replica) => replica.id));
    for (const [id, row] of this.replicas) {
      if (!live.has(id)) {
        row.element.remove();
        this.replicas.delete(id);
      }
    }
    for (const replica of replicas) {
      if (!this.replicas.has(replica.id)) this.replicas.set(replica.id, new Row(this.rows, replica));
      this.replicas.get(replica.id).show(replica);
    }
  }

  showTiles(replicas, text) {
    if (!replicas.length) {
      this.tiles?.element.remove();
      this.tiles = null;
      return;
    }
    if (!this.tiles) {
      const element = make(this.element, "div");
      this.tiles = { element, picture: new Tiles(element) };
      const legend = make(element, "p", "legend");
      setText(legend, "Filled: KV pages in use. Orange frame: requests wait. Red frame: lost. Dashed: draining.");
    }
    this.tiles.picture.show(
      replicas.map((replica) => {
        const load = replica.load, usage = load?.total_blocks ? 1 - load.free_blocks / load.total_blocks : 0;
        const title = `${replica.id}: ${replica.state}, ${load?.running ?? 0} running, ${load?.waiting ?? 0} waiting, KV ${percent(usage)}`;
        return { usage, state: replica.state, waiting: load?.waiting ?? 0, title };
      }),
      text,
    );
  }
}

class Row {
  constructor(parent, replica) {
    this.element = make(parent, "div", "replica");
    const name = make(this.element, "div", "name");
    setText(make(name, "b"), replica.id);
    this.note = make(name, "span", "muted");
    const seqs = make(this.element, "div"), pages = make(this.element, "div");
    this.seqsText = make(make(seqs, "p", "caption"), "span");
    this.queue = make(seqs.firstChild, "span", "queue");
    this.seqs = new Cells(seqs, { columns: 32, cells: Math.min(Math.max(replica.max_num_seqs, 1), 64), label: "Batch" });
    this.pagesText = make(make(pages, "p", "caption"), "span");
    this.step = make(pages.firstChild, "span");
    this.pages = new Cells(pages, { columns: 48, cells: 144, label: "KV pages" });
  }

  show(replica) {
    this.element.dataset.state = replica.state;
    const load = replica.load;
    const silent = replica.silent_s > 5 ? `, silent for ${duration(replica.silent_s)}` : "";
    const speed = replica.speed ? `${number(replica.speed.decode)} tok/s` : "";
    setText(this.note, replica.state === "ready" ? `${speed}${silent}` : `${replica.state}${silent}`);
    if (!load) return;
    const slots = Math.max(replica.max_num_seqs, 1), held = load.total_blocks - load.free_blocks;
    const batch = `${load.running} of ${replica.max_num_seqs} running`;
    setText(this.seqsText, batch);
    setText(this.queue, load.waiting ? `${number(load.waiting)} waiting` : "");
    this.seqs.show([["on", load.running / slots], ["wait", load.waiting / slots]], `${batch}, ${load.waiting} waiting`);
    const pages = `${number(held)} of ${number(load.total_blocks)} pages`;
    setText(this.pagesText, pages);
    setText(this.step, load.steps ? `${time(load.step_s)}/step` : "");
    this.pages.show([["on", load.total_blocks ? held / load.total_blocks : 0]], pages);
  }
}

function make(parent, tag, className = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const time = (seconds) => (seconds < 0.1 ? `${(1000 * seconds).toFixed(1)} ms` : seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(1)} s`);
const duration = (seconds) => (seconds < 120 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`);
const number = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n >= 1e4 ? `${(n / 1e3).toFixed(1)} k` : n.toLocaleString("en", { maximumFractionDigits: n < 10 && n % 1 ? 1 : 0 }));

function imbalance(layer) {
  const total = layer.reduce((a, n) => a + n, 0);
  return total ? (Math.max(...layer) * layer.length) / total : 0;
}
