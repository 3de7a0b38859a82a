// Tokens and layers: under each token a cell for every layer, coloured by an answer's probability.
const root = element.querySelector(".lqa-heat");
const STAGES = { scanning: "scanning …", stopping: "stopping …", stopped: "stopped", done: "" };
const head = make("div", "head"), status = make("div", "status"), field = make("div", "field"), legend = make("div", "legend");
status.setAttribute("role", "status");
root.replaceChildren(head, legend, field, status);
let built = "", cells = {}, order = [], cursor = null, shown = 0;

function pickAnswer(i) {
  shown = i;
  paint();
}
function open(token, layer) {
  props.value = { ...props.value, pick: { token, layer } };
  trigger("select");
}

function build(view) {
  cells = {}; order = []; cursor = null;
  head.setAttribute("role", "radiogroup");
  head.setAttribute("aria-label", "Answer shown");
  head.replaceChildren(...view.answers.map((answer, i) => {
    const node = button("answer", answer, () => pickAnswer(i));
    node.setAttribute("role", "radio");
    return node;
  }));
  const ramp = make("span", "ramp");
  ramp.setAttribute("aria-hidden", "true");
  const chance = Math.round(100 / Math.max(view.answers.length, 1));
  legend.replaceChildren(
    make("span", "", "0 %"), ramp, make("span", "", "100 %"),
    make("span", "about", "Chance: " + chance + " %. Cells from the top: layer " + view.layers.join("; ") + "."),
  );
  legend.hidden = !view.answers.length;
  field.replaceChildren();
  field.setAttribute("role", "grid");
  field.setAttribute("aria-label", "Tokens and layers");
  let turn = null, row = null;
  view.tokens.forEach((token, i) => {
    if (!row || turn !== token.turn) {
      turn = token.turn;
      const group = make("div", "turn " + token.role);
      group.append(make("span", "role", token.role === "template" ? "template preamble" : token.role));
      row = make("div", "row");
      group.append(row);
      field.append(group);
    }
    const column = make("div", "column" + (token.special ? " special" : ""));
    const name = make("span", "name");
    drawToken(name, token.text);
    column.append(name);
    for (const layer of view.layers) {
      const cell = button("cell", "", () => { cursor = cell; open(i, layer); });
      cell.tabIndex = -1;
      cell.dataset.token = i;
      cell.dataset.layer = layer;
      cells[layer + ":" + i] = cell;
      order.push(cell);
      column.append(cell);
    }
    row.append(column);
  });
}

function paint() {
  const view = props.value;
  [...head.children].forEach((node, i) => {
    node.setAttribute("aria-checked", i === shown);
    node.tabIndex = i === shown ? 0 : -1;
  });
  for (const layer of view.layers) {
    view.tokens.forEach((token, i) => {
      const cell = cells[layer + ":" + i], found = view.cells[layer] && view.cells[layer][i];
      cell.disabled = !found;
      cell.classList.toggle("known", Boolean(found));
      const percent = found ? Math.round(100 * found[shown]) : null;
      cell.style.setProperty("--share", found ? percent + "%" : "0%");
      const text = found ? JSON.stringify(token.text) + ", layer " + layer + ": " + percent + " % " + view.answers[shown] : "";
      cell.title = text;
      cell.setAttribute("aria-label", text);
    });
  }
  if (!cursor || cursor.disabled) cursor = order.find((cell) => !cell.disabled) || null;
  order.forEach((cell) => { cell.tabIndex = cell === cursor ? 0 : -1; });
  set(status, [view.note, view.waiting ? "waiting for the model …" : STAGES[view.stage]].filter(Boolean).join(" · "));
}

head.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  pickAnswer((shown + step + head.children.length) % head.children.length);
  head.children[shown].focus();
});
field.addEventListener("keydown", (event) => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const layers = props.value.layers, at = layers.indexOf(cell.dataset.layer), token = Number(cell.dataset.token);
  const moves = { ArrowLeft: [token - 1, at], ArrowRight: [token + 1, at], ArrowUp: [token, at - 1], ArrowDown: [token, at + 1] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const other = cells[layers[moves[event.key][1]] + ":" + moves[event.key][0]];
  if (!other || other.disabled) return;
  cursor = other;
  order.forEach((node) => { node.tabIndex = node === cursor ? 0 : -1; });
  other.focus();
});

function update() {
  const view = props.value;
  if (!view) return;
  root.dataset.stage = view.stage;
  const text = JSON.stringify([view.tokens, view.layers, view.answers]);
  if (text !== built) { built = text; shown = 0; build(view); }
  paint();
}
watch("value", update);
update();
