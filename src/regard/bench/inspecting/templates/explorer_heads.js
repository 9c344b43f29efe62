// Views of heads: the matrix, strength by distance, two metrics against each other.
choices("metric", metrics);
choices("sort", []);
choices("x", metrics);
choices("y", metrics);
const order = range(L).map(() => range(H));
const buttons = [];
const headRow = make("tr", at("matrix"));
make("th", headRow);
const headNames = range(H).map(() => make("th", headRow));
for (const l of range(L)) {
  const line = make("tr", at("matrix"));
  make("th", line, data.layers[l]);
  buttons.push(range(H).map((column) => {
    const button = make("button", make("td", line));
    button.addEventListener("click", (event) => {
      const i = l * H + order[l][column];
      if (event.shiftKey) set({ picked: toggled(state.picked, i) });
      else choose(i);
    });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const i = l * H + order[l][column];
      if (step) {
        const [to, beside] = [Math.min(Math.max(l + step[0], 0), L - 1), Math.min(Math.max(column + step[1], 0), H - 1)];
        choose(to * H + order[to][beside]);
        buttons[to][beside].focus();
      } else if (event.key.toLowerCase() === "o" && data.answers) set({ off: toggled(state.off, i) });
      else if (event.key.toLowerCase() === "p") set({ picked: toggled(state.picked, i) });
      else return;
      event.preventDefault();
    });
    return button;
  }));
}
views.push(() => {
  const values = data.metrics[state.metric], [low, high] = extent(values.flat());
  const least = Math.min(0, low), span = high - least || 1;
  at("least").textContent = short(least);
  at("most").textContent = short(high);
  const sorted = state.sort === "by colour";
  headNames.forEach((name, h) => { name.textContent = sorted ? "" : data.heads[h]; });
  for (const l of range(L)) {
    order[l] = range(H);
    if (sorted) order[l].sort((a, b) => values[l][b] - values[l][a]);
    order[l].forEach((h, column) => {
      const button = buttons[l][column], i = l * H + h, chosen = i === current();
      button.title = nameOf(i);
      button.setAttribute("aria-label", `${nameOf(i)}, ${state.metric} ${short(values[l][h])}${state.off.has(i) ? ", off" : ""}`);
      button.style.background = rgb(ramp((values[l][h] - least) / span));
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
      button.className = `${state.picked.has(i) ? "picked " : ""}${state.off.has(i) ? "off" : ""}`;
    });
  }
  const i = current();
  const template = data.templates[state.layer][state.head].replaceAll("_", " ");
  at("told").textContent = `${nameOf(i)}: ${state.metric} ${short(valueOf(state.metric, i))}, most like “${template}”`;
  at("picks").textContent = state.picked.size ? `${state.picked.size} heads selected` : "";
  at("clear").disabled = !state.picked.size && state.cluster < 0;
});
at("clear").addEventListener("click", () => set({ picked: new Set(), cluster: -1 }));

views.push(() => {
  const K = data.profile[0][0].length;
  const means = data.profile.map((heads) => range(K).map((k) => heads.reduce((sum, own) => sum + own[k], 0) / H));
  const dashed = [...state.picked].map((i) => data.profile[Math.floor(i / H)][i % H]);
  const most = Math.max(...means.flat(), ...data.profile[state.layer].flat(), ...dashed.flat()) || 1;
  const { svg, add, place } = drawing("profile", [0, Math.max(K - 1, 1)], [0, most], { title: "hops" });
  const line = (profile, settings) => add("polyline", {
    points: profile.map((value, k) => place(k, value).map((v) => v.toFixed(1)).join(",")).join(" "), fill: "none", ...settings });
  const column = (k) => data.profile[state.layer].map((profile) => profile[k]);
  const up = range(K).map((k) => place(k, Math.max(...column(k))));
  const down = range(K).map((k) => place(k, Math.min(...column(k)))).reverse();
  add("polygon", { points: [...up, ...down].map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "), fill: BLUE, opacity: 0.2 });
  means.forEach((mean, l) => line(mean, { stroke: layerColour(l), "stroke-width": 1 }));
  for (const profile of dashed) line(profile, { stroke: BLUE, "stroke-width": 1.5, "stroke-dasharray": "4 2" });
  const own = data.profile[state.layer][state.head];
  line(own, { stroke: MARK, "stroke-width": 3 });
  svg.setAttribute("aria-label", own.join(" "));
});

function point(add, [x, y], i, colour, more = {}) {
  const chosen = i === current(), picked = state.picked.has(i);
  const made = add("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: chosen ? 6 : 4, fill: colour,
    stroke: chosen ? MARK : picked ? BLUE : "none", "stroke-width": chosen ? 3 : 2.5,
    opacity: state.picked.size && !picked && !chosen ? 0.35 : 0.9, style: "cursor:pointer", ...more });
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = nameOf(i);
  made.appendChild(title);
  made.addEventListener("click", (event) => event.shiftKey ? set({ picked: toggled(state.picked, i) }) : choose(i));
  return made;
}
views.push(() => {
  const values = data.metrics.distance, [, most] = extent(values.flat());
  const { svg, add, place } = drawing("reach", [0, Math.max(L - 1, 1)], [0, most], { title: "layer" });
  const means = values.map((heads) => heads.reduce((a, b) => a + b) / H);
  add("polyline", { points: means.map((mean, l) => place(l, mean).join(",")).join(" "), fill: "none", stroke: GREY });
  for (const i of range(L * H)) point(add, place(Math.floor(i / H), valueOf("distance", i)), i, layerColour(Math.floor(i / H)));
  svg.setAttribute("aria-label", `mean distances of layers: ${means.map(short).join(" ")}`);
});

function ranked(values) {
  const sorted = range(values.length).sort((a, b) => values[b] - values[a]), ranks = [];
  sorted.forEach((i, rank) => { ranks[i] = rank + 1; });
  return ranks;
}
at("ranks").addEventListener("change", () => set({ ranks: at("ranks").checked }));
let scatterAt = [];
views.push(() => {
  at("ranks").checked = state.ranks;
  let [xs, ys] = [state.x, state.y].map((metric) => data.metrics[metric].flat());
  if (state.ranks) [xs, ys] = [ranked(xs), ranked(ys)];
  const { svg, add, place } = drawing("scatter", extent(xs), extent(ys), { title: state.ranks ? "rank, 1 = largest" : state.x });
  scatterAt = range(L * H).map((i) => place(xs[i], ys[i]));
  for (const i of range(L * H)) point(add, scatterAt[i], i, layerColour(Math.floor(i / H)));
  const tau = data.agreement[metrics.indexOf(state.x)][metrics.indexOf(state.y)];
  at("tau").textContent = `Kendall's tau ${short(tau)}.`;
  svg.setAttribute("aria-label", `${state.x} against ${state.y}, Kendall's tau ${short(tau)}`);
});

// Dragging in a drawing: a rectangle or a line around points; `chosen` gets who is inside.
function brush(name, lasso, inside) {
  const svg = at(name);
  let path = null, drawn = null;
  const size = () => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height];
  svg.addEventListener("pointerdown", (event) => { path = [where(event, svg, ...size())]; });
  svg.addEventListener("pointermove", (event) => {
    if (path === null) return;
    const [start, now] = [path[0], where(event, svg, ...size())];
    if (!drawn && Math.hypot(now[0] - start[0], now[1] - start[1]) < 5) return;
    if (!drawn) {
      svg.setPointerCapture(event.pointerId);
      drawn = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polygon"));
      for (const [key, value] of Object.entries({ fill: BLUE, "fill-opacity": 0.15, stroke: BLUE })) drawn.setAttribute(key, value);
    }
    path = lasso ? [...path, now] : [start, now];
    const shape = lasso ? path : [start, [now[0], start[1]], now, [start[0], now[1]]];
    drawn.setAttribute("points", shape.map((p) => p.join(",")).join(" "));
  });
  const end = () => {
    if (drawn) {
      const shape = lasso ? path : [path[0], [path[1][0], path[0][1]], path[1], [path[0][0], path[1][1]]];
      inside((x, y) => within(x, y, shape));
    }
    path = drawn = null;
  };
  svg.addEventListener("pointerup", end);
  svg.addEventListener("pointercancel", () => { path = drawn = null; show(); });
}
function within(x, y, shape) {
  let odd = false;
  shape.forEach(([ax, ay], k) => {
    const [bx, by] = shape[(k + 1) % shape.length];
    if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
  });
  return odd;
}
brush("scatter", false, (hit) => set({ picked: new Set(range(L * H).filter((i) => hit(...scatterAt[i]))), cluster: -1 }));
