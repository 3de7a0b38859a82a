// The reply as it is written, and under it what the activations say.
const root = element.querySelector(".lqa-watch");
const STAGES = { watching: "watching …", stopping: "stopping …", stopped: "stopped" };
const COLOURS = ["#2f7fd6", "#d97706", "#6d28d9", "#0f766e", "#be185d", "#64748b"], DASHES = ["", "6 4", "2 3", "8 3 2 3", "1 4", "10 5"];
const question = make("h3", "question"), reply = make("div", "reply"), legend = make("div", "legend"), chart = make("div", "chart");
const said = make("ol", "said"), status = make("div", "status");
status.setAttribute("role", "status");
reply.dir = "auto";
reply.setAttribute("aria-label", "The model's reply");
root.replaceChildren(question, reply, legend, chart, said, status);
let pieces = [], answers = "";
const W = 640, H = 170, LEFT = 40, BOTTOM = 26, TOP = 8;

function draw(view) {
  const points = view.points.filter((point) => point.p);
  chart.hidden = legend.hidden = !view.answers.length;
  if (chart.hidden) return;
  const most = Math.max(view.pieces.length, 24);
  const x = (at) => LEFT + ((W - LEFT - 8) * at) / most, y = (p) => TOP + (H - TOP - BOTTOM) * (1 - p);
  const drawing = svg("svg", { viewBox: "0 0 " + W + " " + H, role: "img" });
  const last = points[points.length - 1];
  drawing.setAttribute("aria-label", last ? "After " + last.at + " tokens: " + view.answers.map((a, i) => a + " " + Math.round(100 * last.p[i]) + " %").join("; ") : "No reading yet");
  for (const p of [0, 0.5, 1]) {
    drawing.append(svg("line", { x1: LEFT, x2: W - 8, y1: y(p), y2: y(p), class: "rule" }));
    const label = svg("text", { x: LEFT - 6, y: y(p) + 4, "text-anchor": "end" });
    label.textContent = 100 * p + " %";
    drawing.append(label);
  }
  const label = svg("text", { x: W - 8, y: H - 4, "text-anchor": "end" });
  label.textContent = "tokens of the reply: " + view.pieces.length;
  drawing.append(label);
  view.answers.forEach((_, i) => {
    const path = points.map((point) => x(point.at) + "," + y(point.p[i])).join(" ");
    drawing.append(svg("polyline", { points: path, fill: "none", stroke: COLOURS[i], "stroke-width": 2.5, "stroke-dasharray": DASHES[i] }));
    for (const point of points) drawing.append(svg("circle", { cx: x(point.at), cy: y(point.p[i]), r: 3, fill: COLOURS[i] }));
  });
  chart.replaceChildren(drawing);
}

function update() {
  const view = props.value;
  if (!view) return;
  root.dataset.stage = view.stage;
  set(question, view.question);
  if (pieces.some((piece, i) => view.pieces[i] !== piece.textContent)) { pieces = []; reply.replaceChildren(); }
  for (const text of view.pieces.slice(pieces.length)) {
    const node = make("span", "piece", text);
    pieces.push(node);
    reply.append(node);
  }
  if (!pieces.length) set(reply, view.stage === "idle" ? "The reply will be written here." : "");
  let value = null;
  const at = new Map(view.points.map((point) => [point.at, point]));
  pieces.forEach((node, i) => {
    const point = view.points.find((other) => other.at > i);
    value = point && point.p ? point.p[0] : null;
    node.style.borderBottomColor = value === null ? "transparent" : "color-mix(in srgb, " + COLOURS[0] + " " + Math.round(100 * value) + "%, " + (COLOURS[1]) + ")";
    node.title = value === null ? "" : Math.round(100 * value) + " % " + view.answers[0];
    node.classList.toggle("read", at.has(i + 1));
  });
  if (JSON.stringify(view.answers) !== answers) {
    answers = JSON.stringify(view.answers);
    legend.replaceChildren(...view.answers.map((answer, i) => {
      const entry = make("span", "entry"), line = svg("svg", { viewBox: "0 0 26 6", width: 26, height: 6, "aria-hidden": "true" });
      line.append(svg("line", { x1: 0, x2: 26, y1: 3, y2: 3, stroke: COLOURS[i], "stroke-width": 3, "stroke-dasharray": DASHES[i] }));
      entry.append(line, document.createTextNode(answer));
      return entry;
    }));
  }
  draw(view);
  const words = view.points.filter((point) => "text" in point);
  said.hidden = !words.length;
  while (said.children.length > words.length) said.lastChild.remove();
  words.forEach((point, i) => {
    if (!said.children[i]) said.append(make("li", ""));
    set(said.children[i], "after " + point.at + " tokens: " + (point.text || "(no words)"));
  });
  set(status, [view.note, view.waiting ? "waiting for the model …" : STAGES[view.stage]].filter(Boolean).join(" · "));
}
watch("value", update);
update();
