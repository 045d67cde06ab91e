// The picture of the placement: a bar for each device, a cell for each block, the pace, and what happened to memory.

const ACCELERATOR_HUES = ["green", "magenta", "cyan", "yellow"];
const PARTS = [
  ["weights", "weights"],
  ["kv_cache", "KV cache"],
  ["activations", "activations"],
  ["streaming", "streaming"],
  ["reserved", "headroom"],
];
const LETTERS = { embedding: "E", norm: "N", head: "H", other: "·", experts: "x" };
const POINTS = 60;
const MOST_SHOWN = 20;
const byId = (id) => document.getElementById(id);

/** Returns bytes as Lyra writes them everywhere: three digits, powers of a thousand. */
function bytes(amount) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let value = Math.abs(amount);
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${amount < 0 ? "-" : ""}${value.toFixed(digits)} ${units[unit]}`;
}

class Placement {
  constructor() {
    this.hues = new Map();
    this.rates = [];
    this.events = new Map();
    this.gist = "";
    this.rate = 0;
  }

  draw(picture) {
    byId("model").textContent = `${picture.model} · context ${picture.context_length} · rung ${picture.rung}`;
    const accelerators = picture.devices.filter(({ device }) => device !== "cpu" && device !== "disk");
    this.hues = new Map(accelerators.map(({ device }, at) => [device, ACCELERATOR_HUES[at % ACCELERATOR_HUES.length]]));
    this.hues.set("cpu", "blue").set("disk", "grey");
    byId("devices").replaceChildren(...picture.devices.map((device) => this.device(device)));
    this.strip(picture);
    for (const event of picture.memory_events) this.events.set(event.number, event);
    this.happened();
    this.figures(picture.figures);
  }

  device(device) {
    const hue = this.hues.get(device.device);
    const amounts = PARTS.map(([part, label]) => [part, label, device[part]]).filter(([, , amount]) => amount);
    const bar = make("div", { className: "bar" });
    const keys = make("ul", { className: "parts" });
    const whole = Math.max(device.limit, device.used, 1);
    for (const [part, label, amount] of amounts) {
      const piece = make("div", { className: "part" });
      piece.dataset.part = part;
      piece.style.width = `${(100 * amount) / whole}%`;
      bar.append(piece);
      keys.append(key(part, label, bytes(amount)));
    }
    if (device.limit) keys.append(key("free", "free", bytes(device.unused)));
    const told = device.limit ? `${bytes(device.used)} of ${bytes(device.limit)}` : `${bytes(device.used)}, read as it is used`;
    const head = make("div", { className: "device-head" }, make("strong", {}, device.device), make("span", {}, told));
    const free = device.free_now === null ? "" : `${bytes(device.free_now)} free now`;
    const now = make("span", { className: "free-now" }, free);
    now.dataset.device = device.device;
    const name = make("p", { className: "device-name" }, device.name ? `${device.name} · ` : "", now);
    const made = make("div", {}, head, device.limit ? bar : "", keys, name);
    made.dataset.hue = hue;
    made.dataset.device = device.device;
    bar.setAttribute("aria-hidden", "true");
    return made;
  }

  strip(picture) {
    const before = new Map([...byId("strip").children].map((cell) => [cell.dataset.block, cell]));
    const cells = picture.blocks.map((block) => this.cell(block, before.get(block.block)));
    byId("strip").replaceChildren(...cells);
    const held = picture.devices.map(({ device }) => [device, holdings(picture.blocks.filter((b) => b.device === device))]);
    const holding = held.filter(([, what]) => what);
    byId("strip").setAttribute("aria-label", holding.map(([device, what]) => `${device}: ${what}`).join("; "));
    byId("held").replaceChildren(...holding.map(([device, what]) => {
      const line = make("li", {}, make("i"), make("b", {}, device), ` ${what}`);
      line.dataset.hue = this.hues.get(device);
      return line;
    }));
    const layers = picture.blocks.filter(({ kind }) => kind === "layer");
    const counts = picture.devices.map(({ device }) => [layers.filter((layer) => layer.device === device).length, device]);
    this.gist = counts.filter(([count]) => count).map(([count, device]) => `${count} on ${device}`).join(", ");
  }

  /** Returns the cell of a block; the one that is there, so that a change of its color can be seen. */
  cell(block, before) {
    const cell = before ?? make("span", { className: "cell" });
    cell.textContent = block.kind === "layer" ? block.index : LETTERS[block.kind] ?? "·";
    const moved = block.device !== block.home;
    cell.title = `${block.block} on ${block.device}${moved ? `, loaded on ${block.home}` : ""}: ${bytes(block.weights)}; ${block.reason}`;
    Object.assign(cell.dataset, { block: block.block, kind: block.kind, hue: this.hues.get(block.device), device: block.device });
    if (moved) Object.assign(cell.dataset, { moved: block.home, home: this.hues.get(block.home) });
    else delete cell.dataset.moved;
    return cell;
  }

  figures(figures) {
    this.rate = figures.tokens_per_second;
    const shown = this.rate >= 10 ? this.rate.toFixed(0) : this.rate.toFixed(1).replace(/\.0$/, "");
    byId("rate").textContent = shown;
    const taken = `${figures.reserved_tokens} of ${figures.room_tokens} tokens taken`;
    byId("load").textContent = `${figures.running} running · ${figures.waiting} waiting · ${taken}`;
    byId("gist").textContent = [this.gist, ...(this.rate ? [`${shown} tok/s`] : [])].join(" · ");
    for (const [device, free] of Object.entries(figures.free)) {
      const place = document.querySelector(`.free-now[data-device="${CSS.escape(device)}"]`);
      if (place) place.textContent = `${bytes(free)} free now`;
    }
    this.rates = [...this.rates, this.rate].slice(-POINTS);
    const most = Math.max(1, ...this.rates);
    const step = 120 / (POINTS - 1);
    const first = POINTS - this.rates.length;
    const points = this.rates.map((rate, at) => `${((first + at) * step).toFixed(1)},${(27 - (25 * rate) / most).toFixed(1)}`);
    byId("line").firstElementChild.setAttribute("points", points.join(" "));
  }

  /** Takes in what happened just now; returns whether it is worth saying aloud. */
  memory(event) {
    this.events.set(event.number, event);
    this.happened();
    return event.kind !== "note";
  }

  happened() {
    const shown = [...this.events.values()].sort((a, b) => b.number - a.number).slice(0, MOST_SHOWN);
    this.events = new Map(shown.map((event) => [event.number, event]));
    const lines = shown.map((event) => {
      const at = new Date(1000 * event.at);
      const time = make("time", { dateTime: at.toISOString() }, at.toLocaleTimeString());
      const line = make("li", {}, time, event.message);
      line.dataset.kind = event.kind;
      return line;
    });
    byId("happened").replaceChildren(...(lines.length ? lines : [make("li", {}, "Nothing has moved.")]));
  }

  /** Forgets what another run of the server told. */
  forget() {
    this.events.clear();
  }
}

function key(part, label, amount) {
  const sample = make("i");
  sample.dataset.part = part;
  return make("li", {}, sample, `${label} `, make("b", {}, amount));
}

/** Returns what a device holds in words: "embedding, layers 0-9, norm, head". */
function holdings(blocks) {
  const layers = blocks.filter(({ kind }) => kind === "layer").map(({ index }) => index);
  const experts = blocks.filter(({ kind }) => kind === "experts").map(({ index }) => index);
  const apart = experts.filter((index) => !layers.includes(index));
  const at = blocks.findIndex(({ kind }) => kind === "layer" || kind === "experts");
  const others = (some) => some.filter(({ kind }) => kind !== "layer" && kind !== "experts").map(({ kind }) => kind);
  return [
    ...others(at < 0 ? blocks : blocks.slice(0, at)),
    ...(layers.length ? [ranges("layer", layers)] : []),
    ...(apart.length ? [`experts of ${ranges("layer", apart)}`] : []),
    ...(at < 0 ? [] : others(blocks.slice(at))),
  ].join(", ");
}

function ranges(noun, numbers) {
  const parts = [];
  for (const number of numbers) {
    const last = parts.at(-1);
    if (last && number === last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  const told = parts.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
  return `${noun}${numbers.length === 1 ? "" : "s"} ${told}`;
}

