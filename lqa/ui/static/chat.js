// The chat editor: a system prompt and turns, one box each.
const root = element.querySelector(".lqa-chat");
const ROLES = { system: "System prompt", user: "User", assistant: "Assistant" };
const HINTS = { system: "No system prompt", user: "What the user writes", assistant: "What the assistant answers" };
const list = make("div", "turns");
const add = button("plain", "", () => { commit([...read(), { role: next(), content: "" }]); boxes[boxes.length - 1].focus(); });
const cut = button("plain", "Remove last turn", () => { commit(read().slice(0, -1)); add.focus(); });
const reply = button("plain strong", "Let the model reply", () => { if (!busy) { clearTimeout(timer); props.value = { turns: read(), busy: true }; trigger("submit"); } });
const stop = button("plain", "Stop", () => trigger("stop"));
const bar = make("div", "bar");
bar.append(add, cut, reply, stop);
root.replaceChildren(list, bar);
let boxes = [], roles = "", busy = false, timer = null;

function turnsOf(value) {
  const turns = ((value && value.turns) || []).filter((turn) => turn && turn.role in ROLES);
  if (!turns.length || turns[0].role !== "system") turns.unshift({ role: "system", content: "" });
  if (turns.length < 2) turns.push({ role: "user", content: "" });
  return turns;
}
const read = () => boxes.map((box) => ({ role: box.dataset.role, content: box.value }));
const next = () => (boxes[boxes.length - 1].dataset.role === "user" ? "assistant" : "user");

function grow(box) {
  box.style.height = "auto";
  box.style.height = Math.min(box.scrollHeight + 2, 260) + "px";
}

function build(turns) {
  list.replaceChildren();
  boxes = turns.map((turn, i) => {
    const label = make("label", "turn " + turn.role);
    label.append(make("span", "role", ROLES[turn.role]));
    const box = make("textarea");
    box.dataset.role = turn.role;
    box.rows = 2;
    box.dir = "auto";
    box.placeholder = HINTS[turn.role];
    box.setAttribute("aria-label", turn.role === "system" ? ROLES.system : "Turn " + i + ": " + ROLES[turn.role]);
    box.addEventListener("input", () => { grow(box); later(); });
    label.append(box);
    list.append(label);
    return box;
  });
}

function show(turns) {
  const now = turns.map((turn) => turn.role).join();
  if (now !== roles) { roles = now; build(turns); }
  turns.forEach((turn, i) => {
    if (boxes[i].value !== turn.content) boxes[i].value = turn.content;
    grow(boxes[i]);
  });
  const last = boxes[boxes.length - 1].dataset.role;
  set(add, last === "user" ? "Add an assistant turn" : "Add a user turn");
  add.hidden = cut.hidden = busy;
  cut.disabled = boxes.length < 3;
  reply.disabled = last !== "user" || busy;
  stop.hidden = !busy;
  boxes.forEach((box) => { box.readOnly = busy; });
  root.setAttribute("aria-busy", busy);
}

function later() {
  props.value = { turns: read(), busy: false };
  clearTimeout(timer);
  timer = setTimeout(() => trigger("input"), 350);
}
function commit(turns) { show(turns); later(); }

function update() {
  busy = Boolean(props.value && props.value.busy);
  show(turnsOf(props.value));
}
watch("value", update);
update();
addEventListener("resize", () => boxes.forEach(grow));
