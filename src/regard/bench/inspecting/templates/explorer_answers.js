// What the model answers with heads switched off, and the list of pictures.
const answers = data.answers;
const C = answers ? answers.classes.length + (answers.rest ? 1 : 0) : 0;
const logits = answers && Object.fromEntries(
  ["whole", "without", "withoutLayer", "inOrder"].map((name) => [name, floats(answers[name])]));
const take = (name, place) => logits[name].subarray(place * C, (place + 1) * C);
const inOrder = answers ? answers.order.map(([l, h]) => l * H + h) : [];

// Measured: no head, one head, one layer, the least important ones in steps. Else a sum.
function without(n, off) {
  if (!off.size) return { values: take("whole", n), exact: true };
  const [one] = off, l = Math.floor(one / H);
  if (off.size === 1) return { values: take("without", n * L * H + one), exact: true };
  if (off.size === H && [...off].every((i) => Math.floor(i / H) === l))
    return { values: take("withoutLayer", n * L + l), exact: true };
  const k = answers.counts.indexOf(off.size);
  if (k >= 0 && inOrder.slice(0, off.size).every((i) => off.has(i)))
    return { values: take("inOrder", n * answers.counts.length + k), exact: true };
  const base = take("whole", n), values = Float32Array.from(base);
  for (const i of off) {
    const own = take("without", n * L * H + i);
    for (let c = 0; c < C; c += 1) values[c] += own[c] - base[c];
  }
  return { values, exact: false };
}
function chances(values) {
  const most = Math.max(...values), parts = Array.from(values, (value) => Math.exp(value - most));
  const total = parts.reduce((a, b) => a + b);
  return parts.map((part) => part / total);
}
function best(values) {
  let found = 0;
  for (let c = 1; c < answers.classes.length; c += 1) if (values[c] > values[found]) found = c;
  return found;
}
const className = (c) => c < answers.classes.length ? answers.classes[c] : `${answers.rest} others`;
const labelOf = (n) => {
  const { label } = data.pictures[n];
  return label === null ? null : answers ? answers.numbers.indexOf(label) : null;
};

at("answer").hidden = answers === null;
if (answers) {
  at("out").addEventListener("change", () => set({ off: toggled(state.off, current()) }));
  at("layerOff").addEventListener("click", () => set({ off: new Set(range(H).map((h) => state.layer * H + h)) }));
  at("allOn").addEventListener("click", () => set({ off: new Set() }));
  at("inOrder").max = answers.counts.length - 1;
  at("inOrder").addEventListener("input", () => set({ off: new Set(inOrder.slice(0, answers.counts[+at("inOrder").value])) }));
  views.push(() => {
    const { off } = state, k = answers.counts.indexOf(off.size);
    at("out").checked = off.has(current());
    const stepped = k >= 0 && inOrder.slice(0, off.size).every((i) => off.has(i));
    at("inOrder").value = stepped ? k : 0;
    at("count").textContent = stepped ? `${off.size} of ${L * H}` : `(${off.size} chosen by hand)`;
    const before = chances(take("whole", state.picture)), { values, exact } = without(state.picture, off);
    const now = chances(values);
    at("exact").textContent = !off.size ? "The model as it is."
      : exact ? `Measured with ${off.size === 1 ? nameOf([...off][0]) : `${off.size} heads`} off.`
      : `Estimated for ${off.size} heads off: the sum of what each one alone does to the logits.`;
    at("classes").replaceChildren();
    const top = make("tr", at("classes"));
    for (const text of ["class", "before", "now", ""]) make("th", top, text);
    const order_ = range(answers.classes.length).sort((a, b) => Math.max(before[b], now[b]) - Math.max(before[a], now[a]));
    for (const c of [...order_.slice(0, 6), ...(answers.rest ? [C - 1] : [])]) {
      const line = make("tr", at("classes"));
      make("td", line, className(c)).className = "name";
      make("td", line, before[c].toFixed(4)).className = "before";
      make("td", line, now[c].toFixed(4)).className = "chance";
      const share = make("td", line);
      share.className = "share";
      for (const [kind, value] of [["before", before[c]], ["", now[c]]]) {
        const bar = make("i", share);
        bar.className = kind;
        bar.style.width = `${100 * value}%`;
      }
    }
    confusion(off);
  });
}
function confusion(off) {
  at("changed").hidden = at("confusion").hidden = N < 2;
  if (N < 2) return;
  const first_ = range(N).map((n) => best(take("whole", n))), now = range(N).map((n) => best(without(n, off).values));
  const flips = range(N).filter((n) => first_[n] !== now[n]).length;
  const right = (found) => range(N).filter((n) => labelOf(n) === found[n]).length;
  at("changed").textContent = `${flips} of ${N} answers changed`
    + (answers.labelled ? `; right: ${right(first_)} before, ${right(now)} now.` : ".");
  const truth = answers.labelled ? range(N).map(labelOf) : first_;
  const known = [...new Set([...truth, ...now])].filter((c) => c >= 0).sort((a, b) => a - b);
  at("confusion").replaceChildren();
  const top = make("tr", at("confusion"));
  make("th", top, answers.labelled ? "label ↓ answer →" : "before ↓ now →");
  for (const c of known) make("th", top, className(c));
  for (const t of known) {
    const line = make("tr", at("confusion"));
    make("th", line, className(t));
    for (const c of known) {
      const count = (found) => range(N).filter((n) => truth[n] === t && found[n] === c).length;
      const [a, b] = [count(first_), count(now)];
      const cell = make("td", line, a === b ? b || "" : `${b} (${b > a ? "+" : "−"}${Math.abs(b - a)})`);
      if (t === c) cell.className = "same";
      if (a !== b) cell.classList.add("up");
    }
  }
}

const filters = ["all", ...(answers ? ["changed by heads that are off", "changed without this head"] : []),
  ...(answers && answers.labelled ? ["right", "wrong"] : [])];
choices("filter", filters);
if (!filters.includes(state.filter)) state.filter = "all";
const usual = answers ? [...new Set(range(N).map((n) => className(best(take("whole", n)))))].sort() : [];
choices("class", ["all", ...usual]);
if (!["all", ...usual].includes(state.class)) state.class = "all";
const cards = data.pictures.map(({ name, source }, n) => {
  const button = make("button", at("pictures")), image = make("img", button);
  image.src = source;
  image.alt = "";
  make("div", button, name);
  const told = make("div", button);
  button.addEventListener("click", () => set({ picture: n }));
  return { button, told };
});
views.push(() => {
  let listed = 0;
  cards.forEach(({ button, told }, n) => {
    let shown = true;
    if (answers) {
      const before = best(take("whole", n)), now = best(without(n, state.off).values);
      const alone = best(take("without", n * L * H + current())), label = labelOf(n);
      const mark = label === null ? "" : label === now ? " ✓" : ` ✗ (${answers.numbers.includes(data.pictures[n].label) ? className(label) : "another class"})`;
      told.textContent = (before === now ? className(now) : `${className(before)} → ${className(now)}`) + mark;
      shown = { all: true, "changed by heads that are off": before !== now, "changed without this head": before !== alone,
        right: label === now, wrong: label !== now }[state.filter]
        && (state.class === "all" || className(before) === state.class);
    }
    button.hidden = !shown;
    listed += shown;
    button.classList.toggle("chosen", n === state.picture);
    button.setAttribute("aria-pressed", n === state.picture);
    button.classList.toggle("linked", Boolean(patterns && state.picked.size
      && patterns.points.some(([p, l, h], m) => p === n && state.picked.has(l * H + h) && (state.cluster < 0 || patterns.cluster[m] === state.cluster))));
  });
  at("listed").textContent = `${listed} of ${N}`;
});
