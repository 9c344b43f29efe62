// Attention over a picture, for one query: chosen head, pinned head, all heads.
const images = data.pictures.map(({ source }) => {
  const image = new Image();
  image.src = source;
  image.addEventListener("load", () => show());
  return image;
});
const EDGE = 300, [GRID_ROWS, GRID_COLUMNS] = data.grid;
const CELL = EDGE / Math.max(GRID_ROWS, GRID_COLUMNS);
const WIDE = Math.round(CELL * GRID_COLUMNS), HIGH = Math.round(CELL * GRID_ROWS), BLOCK = CELL * data.factor;
for (const name of ["over", "pinned"]) [at(name).width, at(name).height] = [WIDE, HIGH];
for (const token of range(T)) make("option", at("query"), tokenName(token)).value = token;
at("query").addEventListener("change", () => set({ query: +at("query").value }));

function overlay(canvas, n, i, query) {
  const context = canvas.getContext("2d"), heat = row(n, i, query).slice(PREFIX);
  context.clearRect(0, 0, WIDE, HIGH);
  context.filter = "grayscale(0.6) brightness(0.8)";
  if (images[n].complete && images[n].naturalWidth) context.drawImage(images[n], 0, 0, WIDE, HIGH);
  context.filter = "none";
  const most = Math.max(...heat) || 1;
  heat.forEach((value, place) => {
    const r = Math.floor(place / COLUMNS), c = place % COLUMNS;
    context.fillStyle = `rgba(255, 96, 16, ${(0.8 * value / most).toFixed(3)})`;
    context.fillRect(c * BLOCK, r * BLOCK, BLOCK, BLOCK);
  });
  if (query >= PREFIX) {
    const place = query - PREFIX;
    const box = [(place % COLUMNS) * BLOCK, Math.floor(place / COLUMNS) * BLOCK, BLOCK, BLOCK];
    for (const [width, colour] of [[4, "#000"], [2, "#fff"]]) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.strokeRect(...box);
    }
  }
  return heat;
}
function pinned() {
  const [n, l, h] = state.pin.split(".").map((part) => parseInt(part, 10));
  return n >= 0 && n < N && l >= 0 && l < L && h >= 0 && h < H ? { n, i: l * H + h } : null;
}
views.push(() => {
  at("query").value = state.query;
  const heat = overlay(at("over"), state.picture, current(), state.query);
  const all = row(state.picture, current(), state.query), given_ = all.slice(0, PREFIX).reduce((a, b) => a + b, 0);
  at("looks").textContent = `${nameOf(current())}, ${data.pictures[state.picture].name}, from the ${tokenName(state.query)}`
    + (PREFIX ? `; ${short(100 * given_)} % go to prefix tokens.` : ".");
  at("over").setAttribute("aria-label", `weights on patches: ${Array.from(heat, short).join(" ")}`);
  const other = pinned();
  at("pinnedPart").hidden = other === null;
  at("pin").textContent = other ? "Unpin" : "Pin to compare";
  if (other) {
    overlay(at("pinned"), other.n, other.i, state.query);
    at("pinnedLooks").textContent = `Pinned: ${nameOf(other.i)}, ${data.pictures[other.n].name}`;
    at("pinned").setAttribute("aria-label", at("pinnedLooks").textContent);
  }
});
at("pin").addEventListener("click", () => set({
  pin: pinned() ? "" : `${state.picture}.${state.layer}.${state.head}`,
}));
at("over").addEventListener("click", (event) => {
  const [x, y] = where(event, at("over"), WIDE, HIGH);
  const r = Math.min(Math.floor(y / BLOCK), ROWS - 1), c = Math.min(Math.floor(x / BLOCK), COLUMNS - 1);
  set({ query: PREFIX + r * COLUMNS + c });
});
at("over").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -COLUMNS, ArrowDown: COLUMNS }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  set({ query: Math.min(Math.max(state.query < PREFIX ? PREFIX : state.query + step, 0), T - 1) });
});

// Small maps of all heads.
const TILE = Math.max(18, Math.min(56, Math.floor(380 / H)));
[at("all").width, at("all").height] = [H * TILE, L * TILE];
const tile = document.createElement("canvas");
[tile.width, tile.height] = [COLUMNS, ROWS];
views.push(() => {
  const context = at("all").getContext("2d"), small = tile.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (const i of range(L * H)) {
    const heat = row(state.picture, i, state.query).slice(PREFIX), most = Math.max(...heat) || 1;
    const image = small.createImageData(COLUMNS, ROWS);
    heat.forEach((value, p) => image.data.set([...ramp(Math.sqrt(value / most)), 255], 4 * p));
    small.putImageData(image, 0, 0);
    const [x, y] = [(i % H) * TILE, Math.floor(i / H) * TILE];
    context.drawImage(tile, x + 1, y + 1, TILE - 2, TILE - 2);
    context.lineWidth = 2;
    context.strokeStyle = i === current() ? MARK : state.picked.has(i) ? BLUE : "rgba(0,0,0,0)";
    context.clearRect(x, y, TILE, 1);
    context.clearRect(x, y, 1, TILE);
    context.clearRect(x + TILE - 1, y, 1, TILE);
    context.clearRect(x, y + TILE - 1, TILE, 1);
    context.strokeRect(x + 1, y + 1, TILE - 2, TILE - 2);
  }
  at("all").setAttribute("aria-label", `maps of ${L * H} heads from the ${tokenName(state.query)}`);
});
at("all").addEventListener("click", (event) => {
  const [x, y] = where(event, at("all"), H, L);
  choose(Math.min(Math.floor(y), L - 1) * H + Math.min(Math.floor(x), H - 1));
});
