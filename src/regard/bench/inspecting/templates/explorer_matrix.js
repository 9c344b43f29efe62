// All weights of one head and picture, with zoom, and patches of the picture on the axes.
const AXIS = 26, FIELD = 360;
[at("whole").width, at("whole").height] = [AXIS + FIELD, AXIS + FIELD];
const sheet = document.createElement("canvas");
sheet.width = sheet.height = T;
let sheetOf = "";
function view() {
  const zoom = Math.min(Math.max(state.zoom, 1), Math.max(1, T / 4)), span = T / zoom;
  const bound = (value) => Math.min(Math.max(value, 0), T - span);
  return { zoom, span, left: bound(state.left), top: bound(state.top), cell: FIELD / span };
}
function zoomed(factor, x = 0.5, y = 0.5) {
  const { zoom, span, left, top } = view();
  const next = Math.min(Math.max(zoom * factor, 1), Math.max(1, T / 4)), own = T / next;
  const bound = (value) => +Math.min(Math.max(value, 0), T - own).toFixed(2);
  set({ zoom: +next.toFixed(3), left: bound(left + x * (span - own)), top: bound(top + y * (span - own)) });
}
function thumbnail(context, token, x, y, cell) {
  const size = Math.min(cell - 1, AXIS - 3);
  const image = images[state.picture];
  if (token < PREFIX || !image.complete || !image.naturalWidth) {
    context.fillStyle = token < PREFIX ? MARK : GREY;
    context.fillRect(x, y, size, size);
    return;
  }
  const place = token - PREFIX, wide = image.naturalWidth / GRID_COLUMNS * data.factor;
  const high = image.naturalHeight / GRID_ROWS * data.factor;
  context.drawImage(image, (place % COLUMNS) * wide, Math.floor(place / COLUMNS) * high, wide, high, x, y, size, size);
}
views.push(() => {
  const name = `${state.picture}.${current()}`;
  if (name !== sheetOf) {
    const { codes, most } = picture(state.picture), start = current() * T;
    let top = 0;
    for (const q of range(T)) top = Math.max(top, most[start + q]);
    const context = sheet.getContext("2d"), image = context.createImageData(T, T);
    for (let q = 0; q < T; q += 1) {
      const scale = Math.sqrt(most[start + q] / (top || 1)) / 255;
      for (let k = 0; k < T; k += 1) {
        const colour = ramp(scale * codes[(start + q) * T + k]);
        image.data.set([...colour, 255], 4 * (q * T + k));
      }
    }
    context.putImageData(image, 0, 0);
    sheetOf = name;
  }
  const { left, top, span, cell } = view(), context = at("whole").getContext("2d");
  context.clearRect(0, 0, AXIS + FIELD, AXIS + FIELD);
  context.imageSmoothingEnabled = false;
  context.drawImage(sheet, left, top, span, span, AXIS, AXIS, FIELD, FIELD);
  const y = AXIS + (state.query - top) * cell;
  if (y + cell > AXIS && y < AXIS + FIELD) {
    context.lineWidth = 1.5;
    context.strokeStyle = MARK;
    context.strokeRect(AXIS, y, FIELD, Math.max(cell, 2));
  }
  // Thumbnails stand for every token, or for every so many where cells are small.
  const step = Math.max(1, Math.ceil(14 / cell));
  for (let token = Math.ceil(Math.ceil(left) / step) * step; token < left + span; token += step)
    thumbnail(context, token, AXIS + (token - left) * cell, 1, Math.max(cell, 13));
  for (let token = Math.ceil(Math.ceil(top) / step) * step; token < top + span; token += step)
    thumbnail(context, token, 1, AXIS + (token - top) * cell, Math.max(cell, 13));
  at("whole").setAttribute("aria-label", `weights of ${nameOf(current())}, ${T} by ${T}, zoom ${short(view().zoom)}`);
  if (!at("hovered").textContent) at("hovered").textContent = "Point at a cell to read it.";
});
let dragged = null;
function cellAt(event) {
  const [x, y] = where(event, at("whole"), AXIS + FIELD, AXIS + FIELD), { left, top, cell } = view();
  const [key, query] = [Math.floor(left + (x - AXIS) / cell), Math.floor(top + (y - AXIS) / cell)];
  return x < AXIS || y < AXIS || key >= T || query >= T ? null : { key, query };
}
at("whole").style.touchAction = "none";
at("whole").addEventListener("pointerdown", (event) => {
  dragged = { x: event.clientX, y: event.clientY, ...view(), moved: false };
  at("whole").setPointerCapture(event.pointerId);
});
at("whole").addEventListener("pointermove", (event) => {
  if (dragged) {
    const [dx, dy] = [event.clientX - dragged.x, event.clientY - dragged.y];
    dragged.moved = dragged.moved || Math.hypot(dx, dy) > 4;
    if (dragged.moved) set({ left: +(dragged.left - dx / dragged.cell).toFixed(2), top: +(dragged.top - dy / dragged.cell).toFixed(2) });
    return;
  }
  const cell = cellAt(event);
  if (cell) at("hovered").textContent = `${tokenName(cell.query)} gives ${tokenName(cell.key)} ${short(row(state.picture, current(), cell.query)[cell.key])}`;
});
at("whole").addEventListener("pointerup", (event) => {
  const cell = cellAt(event), moved = dragged && dragged.moved;
  dragged = null;
  if (cell && !moved) set({ query: cell.query });
  else if (moved) { const { left, top } = view(); set({ left, top }); }
});
at("whole").addEventListener("wheel", (event) => {
  event.preventDefault();
  const [x, y] = where(event, at("whole"), AXIS + FIELD, AXIS + FIELD);
  const unit = (value) => Math.min(Math.max((value - AXIS) / FIELD, 0), 1);
  zoomed(event.deltaY < 0 ? 1.25 : 0.8, unit(x), unit(y));
}, { passive: false });
at("whole").addEventListener("keydown", (event) => {
  const { left, top, span } = view();
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (step) {
    const bound = (value) => +Math.min(Math.max(value, 0), T - span).toFixed(2);
    set({ left: bound(left + step[0] * span / 8), top: bound(top + step[1] * span / 8) });
  } else if (event.key === "+" || event.key === "=") zoomed(1.5);
  else if (event.key === "-") zoomed(1 / 1.5);
  else return;
  event.preventDefault();
});
at("closer").addEventListener("click", () => zoomed(1.5));
at("farther").addEventListener("click", () => zoomed(1 / 1.5));
