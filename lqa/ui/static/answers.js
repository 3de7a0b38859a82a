// Answers beside what is answered without these activations.
const root = element.querySelector(".lqa-answers");
const REFERENCES = {
  none: ["No activations", "The decoder, given nothing"],
  shuffled: ["Another chat's activations", "The decoder, reading a chat about something else"],
  text_only: ["Visible text only", "The bare model, shown the selected turns as text"],
};
const STAGES = { reading: "The model reads the chat …", answers: "The decoder answers …", grounding: "Grounding …", references: "References …", stopping: "Stopping …", stopped: "Stopped" };
const GAIN = 3;  // nats: the strongest colour
const LITTLE = 0.1;  // nats per token: no more than this is little

const status = make("div", "status");
status.setAttribute("role", "status");
const cards = make("div", "cards");
const legend = make("div", "legend");
for (const [gain, text] of [[-GAIN, "less probable with the activations"], [0, "no difference"], [GAIN, "more probable"]]) {
  const swatch = make("span", "swatch");
  paint(swatch, gain);
  const entry = make("span", "entry");
  entry.append(swatch, document.createTextNode(text));
  legend.append(entry);
}
legend.append(make("span", "about", "Colour of a word: its log-probability with these activations minus without, in nats (3 nats: 20 times as probable). Underlined: above 1."));
const tools = make("div", "tools");
const asText = button("copy", "Copy as text", () => copyText(plainText(), asText));
const asJson = button("copy", "Copy as JSON", () => copyText(json(), asJson));
const code = make("details", "code");
const source = make("pre");
const copyCode = button("copy", "Copy", () => copyText(source.textContent, copyCode));
code.append(make("summary", "", "Code that repeats this reading"), source, copyCode);
tools.append(asText, asJson, code);
root.replaceChildren(status, legend, cards, tools);
let built = "", parts = [];

const plain = (text) => (text || "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();
const known = (x) => x !== null && x !== undefined;

function paint(node, gain) {
  const share = Math.round(55 * Math.min(Math.abs(gain) / GAIN, 1));
  node.style.background = share < 4 ? "none" : "color-mix(in srgb, var(" + (gain > 0 ? "--more" : "--less") + ") " + share + "%, transparent)";
  node.classList.toggle("much", gain > 1);
}

function plainText() {
  const of = (item, depth) => [
    "  ".repeat(depth) + "Q: " + item.question, "  ".repeat(depth) + "A: " + item.text,
    ...Object.entries(item.references || {}).map(([name, text]) => "  ".repeat(depth + 1) + REFERENCES[name][0] + ": " + text),
    ...item.follow_ups.flatMap((other) => of(other, depth + 1)),
  ];
  const chat = props.value.reading.chat.map((turn) => turn.role + ": " + turn.content);
  return [...chat, "", props.value.note, "", ...props.value.items.flatMap((item) => [...of(item, 0), ""])].join("\n").trim() + "\n";
}
function json() {
  const of = (item) => ({ question: item.question, answer: item.text, confidence: item.confidence, grounding: item.references });
  const { tokens, span, layer, chat } = props.value.reading;
  const answers = props.value.items.map((item) => (item.follow_ups.length ? { ...of(item), follow_ups: item.follow_ups.map(of) } : of(item)));
  return JSON.stringify({ answers, tokens, span, layer, chat }, null, 2);
}

function block(follow) {
  const node = make("article", follow ? "card follow" : "card");
  const question = make("h3", "question");
  const text = make("div", "text");
  text.dir = "auto";
  const foot = make("div", "foot");
  const confidence = make("span", "confidence");
  confidence.title = "How sure the decoder is: the probability that it is right where its sidecar is calibrated, else the mean probability of its tokens.";
  const meter = make("span", "meter"), fill = make("span", "fill");
  meter.append(fill);
  const gain = make("span", "gain");
  foot.append(confidence, meter, gain);
  const details = make("details", "references");
  details.append(make("summary", "", "Without these activations"));
  const grid = make("div", "grid"), references = {};
  for (const [name, [title, about]] of Object.entries(REFERENCES)) {
    const card = make("div", "reference " + name);
    const head = make("div", "title", title), badge = make("span", "badge"), said = make("div", "said");
    said.dir = "auto";
    head.append(badge);
    card.append(head, said, make("div", "about", about));
    grid.append(card);
    references[name] = { card, badge, said };
  }
  details.append(grid);
  node.append(question, text, foot, details);
  return { node, question, text, foot, confidence, fill, gain, details, references, drawn: "" };
}

function fillIn(part, item, stage) {
  set(part.question, item.question);
  const growing = stage === "reading" || stage === "answers";
  part.node.classList.toggle("growing", growing);
  part.node.setAttribute("aria-busy", growing);
  const drawn = JSON.stringify([item.text, item.words, growing]);
  if (drawn !== part.drawn) {
    part.drawn = drawn;
    if (item.words) {
      part.text.replaceChildren(...item.words.map((word) => {
        const node = make("span", "word", word.text.trimStart());
        node.title = (word.gain >= 0 ? "+" : "−") + Math.abs(word.gain).toFixed(2) + " nats";
        node.dataset.gain = word.gain;
        paint(node, word.gain);
        return [word.text.slice(0, word.text.length - word.text.trimStart().length), node];
      }).flat());
    } else set(part.text, item.text || (growing ? "" : "(no words)"));
  }
  const sure = known(item.confidence) && !growing;
  part.foot.classList.toggle("empty", !sure);
  set(part.confidence, sure ? "confidence " + Math.round(100 * item.confidence) + " %" + (item.cannot_tell ? " (a guess: it cannot tell)" : "") : "");
  part.fill.style.width = sure ? 100 * item.confidence + "%" : "0";
  const little = known(item.gain) && item.gain < LITTLE;
  set(part.gain, known(item.gain) ? (little ? "owes little to the activations" : "owed to the activations") + ": " + item.gain.toFixed(2) + " nats a token" : "");
  part.gain.classList.toggle("little", little);
  part.details.classList.toggle("empty", !item.references);
  for (const [name, { card, badge, said }] of Object.entries(part.references)) {
    const text = item.references && item.references[name];
    set(said, known(text) ? text || "(no words)" : "");
    const same = known(text) && plain(text) === plain(item.text);
    card.classList.toggle("same", same);
    set(badge, same ? "same answer" : "");
  }
}

function further(i) {
  const form = make("form", "further");
  const box = make("input");
  box.placeholder = "Ask further about this answer";
  box.setAttribute("aria-label", "Follow-up question to answer " + (i + 1));
  box.maxLength = 300;
  box.dir = "auto";
  const send = make("button", "", "Ask further");
  send.type = "submit";
  form.append(box, send);
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!box.value.trim()) return;
    props.value = { ...props.value, ask: { item: i, question: box.value } };
    box.value = "";
    trigger("submit");
  };
  return form;
}

function update() {
  const value = props.value || { stage: "idle", items: [] };
  root.dataset.stage = value.stage;
  const structure = JSON.stringify(value.items.map((item) => [item.question, item.follow_ups.map((other) => other.question)]));
  if (structure !== built) {
    built = structure;
    const open = parts.map((part) => part.main.details.open);
    parts = value.items.map((item, i) => {
      const main = block(false), others = item.follow_ups.map(() => block(true)), form = further(i);
      main.details.open = open[i] ?? true;
      main.node.append(...others.map((other) => other.node), form);
      return { main, others, form };
    });
    cards.replaceChildren(...parts.map((part) => part.main.node));
  }
  const settled = value.stage === "done" || value.stage === "stopped";
  value.items.forEach((item, i) => {
    const asking = item.follow_ups.length > 0 && !settled ? item.follow_ups.length - 1 : -1;
    fillIn(parts[i].main, item, asking >= 0 || (!settled && item.references) ? "done" : value.stage);
    item.follow_ups.forEach((other, j) => fillIn(parts[i].others[j], other, j === asking && !other.references ? value.stage : "done"));
    parts[i].form.hidden = !settled || !item.text || item.follow_ups.length >= value.most;
  });
  const going = value.waiting ? "Waiting for the model …" : STAGES[value.stage];
  set(status, value.items.length ? [value.note, going].filter(Boolean).join(" · ") : going || "The answers will be written here.");
  legend.hidden = !value.items.length;  // it keeps its place from the start, so that nothing moves when the colours come
  legend.style.visibility = value.items.some((item) => item.words) ? "" : "hidden";
  tools.hidden = !value.reading || !settled;
  set(source, value.code);
}
watch("value", update);
update();
