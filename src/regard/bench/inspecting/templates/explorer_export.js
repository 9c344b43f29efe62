// Files: pictures of views, a table of heads, and what is chosen with its numbers.
function save(name, kind, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function matrixSvg() {
  const size = 18, parts = [];
  buttons.forEach((line, l) => line.forEach((button, column) => {
    const [x, y] = [30 + column * size, 20 + l * size];
    parts.push(`<rect x="${x}" y="${y}" width="${size - 1}" height="${size - 1}" fill="${button.style.background}"`
      + `${button.getAttribute("aria-pressed") === "true" ? ` stroke="${MARK}" stroke-width="3"` : ""}><title>${button.title}</title></rect>`);
  }));
  data.layers.forEach((layer, l) => parts.push(`<text x="4" y="${33 + l * size}" font-size="10">${layer}</text>`));
  parts.push(`<text x="30" y="12" font-size="10">${state.metric}</text>`);
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${40 + H * size}" height="${30 + L * size}" font-family="sans-serif">${parts.join("")}</svg>`;
}
function svgOf(name) {
  if (name === "matrix") return matrixSvg();
  const copy = at(name).cloneNode(true), style = getComputedStyle(at("explorer"));
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("style", `color:${style.color};background:${style.getPropertyValue("--card")};font-family:sans-serif`);
  return new XMLSerializer().serializeToString(copy);
}
function table() {
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const lines = [["layer", "head", "template", ...metrics, "selected", "off"].map(quoted).join(",")];
  for (const i of range(L * H)) {
    const values = metrics.map((metric) => valueOf(metric, i) ?? "");
    lines.push([data.layers[Math.floor(i / H)], data.heads[i % H], quoted(data.templates[Math.floor(i / H)][i % H]),
      ...values, +state.picked.has(i), +state.off.has(i)].join(","));
  }
  return `${lines.join("\r\n")}\r\n`;
}
function report() {
  const heads = (set_) => [...set_].sort((a, b) => a - b).map((i) => ({ layer: data.layers[Math.floor(i / H)], head: data.heads[i % H] }));
  const made = {
    chosen: heads([current()])[0], picture: data.pictures[state.picture].name, query: tokenName(state.query),
    weights: Array.from(row(state.picture, current(), state.query)), selected: heads(state.picked), off: heads(state.off),
    layers: data.layers, heads: data.heads, metrics: data.metrics, agreement: { names: metrics, tau: data.agreement },
    profile: data.profile, templates: data.templates,
  };
  if (answers) {
    made.answers = range(N).map((n) => {
      const { values, exact } = without(n, state.off), before = chances(take("whole", n)), now = chances(values);
      const named = (shares) => Object.fromEntries(shares.map((share, c) => [className(c), share]));
      return { picture: data.pictures[n].name, before: named(before), now: named(now), measured: exact };
    });
  }
  return JSON.stringify(made, null, 1);
}
at("csv").addEventListener("click", () => save("heads.csv", "text/csv", table()));
at("json").addEventListener("click", () => save("heads.json", "application/json", report()));
for (const button of document.querySelectorAll(".explorer [data-export]")) {
  const name = button.dataset.export;
  button.title = `Save this view as ${button.textContent}`;
  button.addEventListener("click", () => {
    if (at(name) instanceof HTMLCanvasElement) save(`${name}.png`, "image/png", bytes(at(name).toDataURL().split(",")[1]));
    else save(`${name}.svg`, "image/svg+xml", svgOf(name));
  });
}
const coarse = data.factor > 1 ? [`Weights are shown between blocks of ${data.factor} x ${data.factor} patches, to keep this page small; of one picture alone they are finer.`] : [];
const lost = answers && answers.lost ? [`${answers.lost} classes that win somewhere are among the others: where they do, the likeliest of those shown stands for them.`] : [];
at("notes").textContent = [...coarse, ...lost, ...data.notes].join(" ");
window.addEventListener("hashchange", () => location.reload());
show();
