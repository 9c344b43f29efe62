// Data, what is chosen, and how every view learns of it.
const data = JSON.parse(document.getElementById("explored").textContent);
const at = (name) => document.getElementById(name);
const make = (kind, parent, text) => {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
};
const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const range = (count) => Array.from({ length: count }, (_, i) => i);
const short = (value) => value === null || !isFinite(value) ? "–"
  : Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : String(+value.toPrecision(3));

const L = data.layers.length, H = data.heads.length, N = data.pictures.length;
const [ROWS, COLUMNS] = data.blocks, PREFIX = data.prefix, T = PREFIX + ROWS * COLUMNS;
const metrics = Object.keys(data.metrics);
const valueOf = (metric, i) => data.metrics[metric][Math.floor(i / H)][i % H];
const nameOf = (i) => `layer ${data.layers[Math.floor(i / H)]}, head ${data.heads[i % H]}`;
const tokenName = (token) => token >= PREFIX
  ? `patch (${Math.floor((token - PREFIX) / COLUMNS)}, ${(token - PREFIX) % COLUMNS})`
  : token === 0 ? "class token" : `prefix token ${token}`;

// Weights of one picture, head and query: m (b / 255)^2.
const unpacked = new Map();
function picture(n) {
  if (!unpacked.has(n)) {
    const { codes, most } = data.pictures[n];
    unpacked.set(n, { codes: bytes(codes), most: floats(most) });
  }
  return unpacked.get(n);
}
function row(n, i, query) {
  const { codes, most } = picture(n), start = i * T + query;
  return Float32Array.from({ length: T }, (_, j) => most[start] * (codes[start * T + j] / 255) ** 2);
}

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function ramp(share) {
  const place = Math.min(Math.max(share || 0, 0), 1) * 4, k = Math.min(Math.floor(place), 3);
  return STOPS[k].map((low, c) => Math.round(low + (place - k) * (STOPS[k + 1][c] - low)));
}
const rgb = (colour) => `rgb(${colour.join(",")})`;
const layerColour = (l) => rgb(ramp(0.15 + 0.8 * l / Math.max(L - 1, 1)));
const KINDS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#9c6bb3", "#b07b4f", "#e377c2", "#7f8c99",
  "#bcbd22", "#17becf"];
const MARK = "#e0631b", BLUE = "#2f8fc9", GREY = "#8a94a0";

// The choice is in the address: #layer=1&head=2&picture=0&off=0.1_2.2
const given = new URLSearchParams(location.hash.slice(1));
const whole = (name, most, otherwise = 0) => {
  const number = parseInt(given.get(name), 10);
  return number >= 0 && number < most ? number : otherwise;
};
const oneOf = (name, names) => names.includes(given.get(name)) ? given.get(name) : names[0];
const headsIn = (name) => new Set((given.get(name) || "").split("_").map((pair) => {
  const [l, h] = pair.split(".").map((part) => parseInt(part, 10));
  return l >= 0 && l < L && h >= 0 && h < H ? l * H + h : -1;
}).filter((i) => i >= 0));
const pairs = (set) => [...set].sort((a, b) => a - b).map((i) => `${Math.floor(i / H)}.${i % H}`).join("_");
const state = {
  picture: whole("picture", N), layer: whole("layer", L), head: whole("head", H),
  query: whole("query", T), metric: oneOf("metric", [metrics.includes("jsd") ? "jsd" : metrics[0], ...metrics]),
  x: oneOf("x", metrics), y: oneOf("y", [metrics[metrics.length - 1], ...metrics]),
  ranks: given.get("ranks") === "1", sort: oneOf("sort", ["by number", "by colour"]),
  colour: oneOf("colour", ["cluster", "layer", "metric"]), cluster: whole("cluster", 99, -1),
  off: data.answers === null ? new Set() : headsIn("off"), picked: headsIn("picked"),
  filter: given.get("filter") || "all", class: given.get("class") || "all", pin: given.get("pin") || "",
  zoom: Math.max(1, parseFloat(given.get("zoom")) || 1),
  left: parseFloat(given.get("left")) || 0, top: parseFloat(given.get("top")) || 0,
};
const current = () => state.layer * H + state.head;
const views = [];
let first = "";
function set(changes) {
  Object.assign(state, changes);
  show();
}
function show() {
  for (const view of views) view();
  const { off, picked, ranks, ...rest } = state;
  const hash = new URLSearchParams({ ...rest, off: pairs(off), picked: pairs(picked), ranks: ranks ? 1 : 0 });
  for (const [key, value] of [...hash]) if (value === "" || (key === "cluster" && value === "-1")) hash.delete(key);
  // The page as it opens has no address but its own.
  if (first === "") first = String(hash);
  if (String(hash) !== first || location.hash) history.replaceState(null, "", `#${hash}`);
}
function choose(i, more = {}) { set({ layer: Math.floor(i / H), head: i % H, ...more }); }
function toggled(set_, i) {
  const made = new Set(set_);
  if (!made.delete(i)) made.add(i);
  return made;
}
function choices(name, values, key = name) {
  for (const value of values) make("option", at(name), value).value = value;
  at(name).addEventListener("change", () => set({ [key]: at(name).value }));
  views.push(() => { at(name).value = state[key]; });
}

// SVG: an axis box with numbers at its ends, and places in it.
function drawing(name, [lowX, highX], [lowY, highY], { title = "", marks = [] } = {}) {
  const svg = at(name), [, , width, height] = svg.viewBox.baseVal ? [0, 0, svg.viewBox.baseVal.width, svg.viewBox.baseVal.height] : [];
  const box = { left: 44, right: width - 8, top: 8, bottom: height - 20 };
  svg.replaceChildren();
  const place = (x, y) => [
    box.left + (box.right - box.left) * (x - lowX) / (highX - lowX || 1),
    box.bottom - (box.bottom - box.top) * (y - lowY) / (highY - lowY || 1),
  ];
  const add = (kind, settings, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(settings)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return svg.appendChild(made);
  };
  add("polyline", { points: `${box.left},${box.top} ${box.left},${box.bottom} ${box.right},${box.bottom}`, fill: "none", stroke: GREY });
  const label = (x, y, text, anchor) => add("text", { x, y, "text-anchor": anchor, fill: "currentColor", "font-size": 10 }, text);
  if (!marks.bare) {
    label(box.left - 3, box.top + 8, short(highY), "end");
    label(box.left - 3, box.bottom, short(lowY), "end");
    label(box.left, box.bottom + 13, short(lowX), "start");
    label(box.right, box.bottom + 13, short(highX), "end");
    if (title) label((box.left + box.right) / 2, box.bottom + 13, title, "middle");
  }
  return { svg, add, place, box };
}
const extent = (values) => {
  const known = values.filter((value) => value !== null && isFinite(value));
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
};
// Where a pointer is, in units of an element's own coordinates.
function where(event, element, width, height) {
  const box = element.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height];
}
