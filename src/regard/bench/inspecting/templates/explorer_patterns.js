// The map of patterns and its gallery.
const patterns = data.patterns;
for (const part of document.querySelectorAll(".explorer .patterns")) part.hidden = patterns === null;
choices("colour", []);
if (patterns) {
  const M = patterns.points.length, K = patterns.names.length;
  const headOf = patterns.points.map(([, l, h]) => l * H + h);
  const maps = bytes(patterns.maps), size = patterns.size;
  let placed = [];
  // Heads most of whose maps are in a cluster belong to it.
  const counts = range(L * H).map(() => new Array(K).fill(0));
  headOf.forEach((i, m) => { counts[i][patterns.cluster[m]] += 1; });
  const belongs = (i, k) => {
    const all = counts[i].reduce((a, b) => a + b);
    return all > 0 && 2 * counts[i][k] >= all;
  };
  views.push(() => {
    const { svg, add, place } = drawing("points", [0, 1], [0, 1], { marks: { bare: true } });
    const values = data.metrics[state.metric].flat(), [low, high] = extent(values);
    const colours = {
      cluster: (m) => KINDS[patterns.cluster[m] % KINDS.length],
      layer: (m) => layerColour(patterns.points[m][1]),
      metric: (m) => rgb(ramp((values[headOf[m]] - low) / (high - low || 1))),
    };
    placed = patterns.at.map(([x, y]) => place(0.02 + 0.96 * x, 0.02 + 0.96 * y));
    const rest = (m) => (state.cluster >= 0 && patterns.cluster[m] !== state.cluster)
      || (state.picked.size && !state.picked.has(headOf[m]));
    const own = (m) => headOf[m] === current();
    for (const m of range(M).sort((a, b) => own(a) - own(b))) {
      const here = own(m) && patterns.points[m][0] === state.picture;
      const made = point(add, placed[m], headOf[m], colours[state.colour](m), {
        r: here ? 6 : own(m) ? 4.5 : 3, opacity: own(m) ? 1 : rest(m) ? 0.12 : 0.65,
        stroke: own(m) ? MARK : "none", "stroke-width": here ? 3 : 1.5,
      });
      made.addEventListener("click", () => set({ picture: patterns.points[m][0] }));
    }
    svg.setAttribute("aria-label", `${M} maps in ${K} clusters; this head: ${counts[current()].map((n, k) => n ? `${n} in ${k}` : "").filter(Boolean).join(", ")}`);
  });
  brush("points", true, (hit) => set({
    picked: new Set(range(M).filter((m) => hit(...placed[m])).map((m) => headOf[m])), cluster: -1,
  }));
  const cards = patterns.names.map((name, k) => {
    const button = make("button", at("gallery")), canvas = make("canvas", button);
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    for (const p of range(size * size)) image.data.set([...ramp(maps[k * size * size + p] / 255), 255], 4 * p);
    context.putImageData(image, 0, 0);
    const title = make("div", button), swatch = make("span", title, "● ");
    swatch.style.color = KINDS[k % KINDS.length];
    make("span", title, `${k}: ${name.replaceAll("_", " ")}`);
    const own = patterns.cluster.filter((c) => c === k).length;
    make("div", button, `${own} maps, cosine ${short(patterns.fit[k])}`);
    const strip = make("div", button);
    strip.className = "strip";
    for (const l of range(L)) {
      const inLayer = range(M).filter((m) => patterns.points[m][1] === l);
      const share = inLayer.filter((m) => patterns.cluster[m] === k).length / Math.max(inLayer.length, 1);
      const bar = make("i", strip);
      bar.style.height = `${100 * share}%`;
      bar.title = `layer ${data.layers[l]}: ${Math.round(100 * share)} %`;
    }
    button.title = "Select the heads of this cluster";
    button.addEventListener("click", () => {
      const off = state.cluster === k;
      set({ cluster: off ? -1 : k, picked: new Set(off ? [] : range(L * H).filter((i) => belongs(i, k))) });
    });
    return button;
  });
  at("quality").textContent = `silhouette ${short(patterns.silhouette)}`;
  views.push(() => cards.forEach((card, k) => {
    card.classList.toggle("chosen", state.cluster === k);
    card.classList.toggle("linked", counts[current()][k] > 0);
    card.setAttribute("aria-pressed", state.cluster === k);
  }));
}
