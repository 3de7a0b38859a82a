// The loss of a training, as it falls.
const root = element.querySelector(".lqa-curve");
const chart = make("div", "chart"), status = make("div", "status");
status.setAttribute("role", "status");
root.replaceChildren(chart, status);
const W = 640, H = 150, LEFT = 44, BOTTOM = 24, TOP = 8;

function update() {
  const view = props.value || { points: [], steps: 0, stage: "idle" };
  root.dataset.stage = view.stage;
  const said = { idle: "The loss will be drawn here while it trains.", stopping: "Stopping …", stopped: "Stopped; the model is as it was." };
  set(status, view.waiting ? "Waiting for the model …" : said[view.stage] || view.note);
  chart.hidden = view.stage === "idle";
  const losses = view.points.flatMap((point) => [point.loss, point.held_out]).filter((y) => y !== null && y !== undefined);
  const top = Math.max(...losses, 0.1) * 1.05;
  const x = (step) => LEFT + ((W - LEFT - 10) * step) / Math.max(view.steps, 1), y = (loss) => TOP + (H - TOP - BOTTOM) * (1 - loss / top);
  const drawing = svg("svg", { viewBox: "0 0 " + W + " " + H, role: "img" });
  const last = view.points[view.points.length - 1];
  drawing.setAttribute("aria-label", last ? "Loss after step " + last.step + ": " + last.loss.toFixed(2) + " nats" : "No step yet");
  for (const part of [0, 0.5, 1]) {
    drawing.append(svg("line", { x1: LEFT, x2: W - 10, y1: y(part * top), y2: y(part * top), class: "rule" }));
    if (!last) continue;
    const label = svg("text", { x: LEFT - 6, y: y(part * top) + 4, "text-anchor": "end" });
    label.textContent = (part * top).toFixed(1);
    drawing.append(label);
  }
  const label = svg("text", { x: W - 10, y: H - 4, "text-anchor": "end" });
  label.textContent = "line: loss of a step, dots: held-out chats (nats) · steps";
  drawing.append(label);
  drawing.append(svg("polyline", { points: view.points.map((p) => x(p.step) + "," + y(p.loss)).join(" "), class: "line" }));
  for (const p of view.points) if (p.held_out !== null) drawing.append(svg("circle", { cx: x(p.step), cy: y(p.held_out), r: 4, class: "dot" }));
  chart.replaceChildren(drawing);
}
watch("value", update);
update();
