// The token strip: a chat as tokens, grouped by turn.  Selection happens here; Python reads it from props.value.selected.
// Text goes into the page by textContent only.
const root = element.querySelector(".lqa-tokens");
const SPANS = { all: "All", system: "System", user: "User", assistant: "Assistant", last: "Last token" };
let view = null, nodes = [], groups = [], buttons = {}, count = null;
let chosen = new Set(), shown = "", anchor = null, cursor = 1, drag = null;

function build() {
  root.replaceChildren();
  nodes = []; groups = []; buttons = {}; anchor = null; drag = null;
  if (!view) return;

  const bar = make("div", "bar");
  const spans = make("div", "spans");
  spans.setAttribute("role", "group");
  spans.setAttribute("aria-label", "Select a span");
  for (const [name, label] of Object.entries(SPANS)) {
    const node = button("span", label, () => { chosen = new Set(view.spans[name]); anchor = null; commit(); });
    node.dataset.span = name;
    node.disabled = !view.spans[name].length;
    buttons[name] = node;
    spans.append(node);
  }
  count = make("span", "count");
  count.setAttribute("aria-live", "polite");
  bar.append(spans, count);

  const box = make("div", "box");
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-multiselectable", "true");
  box.setAttribute("aria-label", "Tokens of the chat");
  let group = null;
  view.tokens.forEach((token, i) => {
    if (!group || group.turn !== token.turn) {
      group = { turn: token.turn, indices: [], pill: make("span", "pill") };
      groups.push(group);
      const turn = make("div", "turn " + token.role);
      turn.setAttribute("role", "group");
      turn.setAttribute("aria-label", token.role);
      const head = make("div", "head");
      head.append(make("span", "role", token.role === "template" ? "template preamble" : token.role), group.pill);
      group.body = make("div", "body");
      turn.append(head, group.body);
      box.append(turn);
    }
    const node = make("span", "tok" + (token.special ? " special" : ""));
    drawToken(node, token.text);
    node.dataset.index = i;
    node.setAttribute("role", "option");
    node.tabIndex = -1;
    if (i === 0) {
      node.classList.add("sink");
      node.setAttribute("aria-disabled", "true");
      node.title = "Position 0 is an activation sink: it belongs to no span";
    } else {
      node.title = "token " + i;
      group.indices.push(i);
    }
    nodes.push(node);
    // Spaces are drawn as dots, so the browser must be told where a line may end.
    if (token.text.startsWith(" ")) group.body.append(make("wbr"));
    group.body.append(node);
    if (token.text.includes("\n")) group.body.append(make("br"));
  });
  root.append(bar, box, make("div", "hint", "Click to toggle, drag or shift-click for a range; arrow keys, space and shift work too."));
  cursor = Math.min(cursor, nodes.length - 1);
}

function paint() {
  nodes.forEach((node, i) => {
    const on = chosen.has(i);
    node.classList.toggle("on", on);
    node.setAttribute("aria-selected", on);
    node.tabIndex = i === cursor ? 0 : -1;
    // Neighbours in a selection are drawn as one piece.
    node.classList.toggle("joined", on && chosen.has(i + 1));
    node.classList.toggle("joins", on && chosen.has(i - 1));
  });
  for (const group of groups) {
    const on = group.indices.filter((i) => chosen.has(i)).length;
    group.pill.textContent = on ? on + " of " + group.indices.length : group.turn < 0 ? "" : "hidden from the decoder";
    group.pill.classList.toggle("on", on > 0);
  }
  for (const [name, node] of Object.entries(buttons)) {
    const span = view.spans[name];
    node.setAttribute("aria-pressed", span.length > 0 && span.length === chosen.size && span.every((i) => chosen.has(i)));
  }
  if (!count) return;
  const over = chosen.size > view.limit;
  count.textContent = chosen.size + " of " + (nodes.length - 1) + " tokens" + (over ? ", at most " + view.limit + " can be read" : "");
  count.classList.toggle("over", over);
}

function commit() {
  paint();
  props.value = { ...view, selected: [...chosen].sort((a, b) => a - b) };
}

function range(a, b, on, base) {
  const next = new Set(base);
  for (let i = Math.max(1, Math.min(a, b)); i <= Math.max(a, b); i++) on ? next.add(i) : next.delete(i);
  return next;
}

function toggle(i, extend) {
  if (extend && anchor !== null) chosen = range(anchor, i, true, chosen);
  else { chosen.has(i) ? chosen.delete(i) : chosen.add(i); anchor = i; }
  cursor = i;
  commit();
}

function indexOf(target) {
  const node = target.closest && target.closest(".tok");
  const i = node && root.contains(node) ? Number(node.dataset.index) : 0;
  return i > 0 ? i : null;  // position 0 cannot be selected
}

// A mouse may drag over tokens; a finger taps, so that it can still scroll the page.
root.addEventListener("pointerdown", (event) => {
  const i = indexOf(event.target);
  if (event.pointerType !== "mouse" || event.button !== 0 || i === null || event.shiftKey) return;
  drag = { from: i, on: !chosen.has(i), base: new Set(chosen), moved: false };
});
root.addEventListener("pointerover", (event) => {
  const i = indexOf(event.target);
  if (!drag || i === null || (i === drag.from && !drag.moved)) return;
  drag.moved = true;
  chosen = range(drag.from, i, drag.on, drag.base);
  cursor = i;
  paint();
});
window.addEventListener("pointerup", () => {
  if (!drag) return;
  if (drag.moved) { anchor = drag.from; commit(); }
  const finished = drag;
  drag = null;
  if (finished.moved) {  // the click that ends a drag is no toggle
    const swallow = (event) => event.stopPropagation();
    root.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => root.removeEventListener("click", swallow, { capture: true }), 0);
  }
});
root.addEventListener("click", (event) => {
  const i = indexOf(event.target);
  if (i !== null) toggle(i, event.shiftKey);
});
root.addEventListener("mousedown", (event) => { if (indexOf(event.target) !== null) event.preventDefault(); });  // no text selection

function line(i, down) {
  const at = nodes[i].getBoundingClientRect();
  let best = null, least = Infinity;
  nodes.forEach((node, j) => {
    const box = node.getBoundingClientRect();
    const rows = down ? box.top - at.top : at.top - box.top;
    if (j < 1 || rows < at.height / 2) return;
    const distance = rows * 1000 + Math.abs(box.left - at.left);
    if (distance < least) { least = distance; best = j; }
  });
  return best === null ? i : best;
}

root.addEventListener("keydown", (event) => {
  if (!event.target.closest(".tok")) return;
  const last = nodes.length - 1;
  const moves = {
    ArrowLeft: () => Math.max(1, cursor - 1), ArrowRight: () => Math.min(last, cursor + 1),
    ArrowUp: () => line(cursor, false), ArrowDown: () => line(cursor, true), Home: () => 1, End: () => last,
  };
  if (event.key === " " || event.key === "Enter") {
    event.preventDefault();
    if (cursor > 0) toggle(cursor, event.shiftKey);
  } else if (moves[event.key]) {
    event.preventDefault();
    const next = moves[event.key]();
    if (event.shiftKey) {
      if (anchor === null) anchor = cursor;
      chosen = range(anchor, next, true, chosen);
    }
    cursor = next;
    event.shiftKey ? commit() : paint();
    nodes[cursor].focus();
  }
});

function update() {
  view = props.value;
  const text = JSON.stringify(view && [view.tokens, view.spans]);
  chosen = new Set(view ? view.selected : []);
  if (text !== shown) { shown = text; cursor = chosen.size ? Math.min(...chosen) : 1; build(); }
  paint();
}

watch("value", update);
update();
