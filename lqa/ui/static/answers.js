// The answer beside its references.  Text goes into the page by textContent only.
const root = element.querySelector(".lqa-answers");
const CARDS = {
  answer: ["With these activations", ""],
  none: ["No activations", "The decoder alone: what it says when it is given nothing."],
  shuffled: ["Another chat's activations", "The decoder, reading a chat about something else."],
  text_only: ["Visible text only", "No activations, bare model: it is shown the selected turns as text."],
};

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

const head = make("div", "asked");
const question = make("span", "question");
const note = make("span", "note");
head.append(question, note);
const grid = make("div", "grid");
const cards = {};
for (const [name, [title, about]] of Object.entries(CARDS)) {
  const card = make("div", "card " + name);
  card.dataset.name = name;
  const top = make("div", "title", title);
  const badge = make("span", "badge");
  top.append(badge);
  const text = make("div", "text");
  const foot = make("div", "foot", about);
  card.append(top, text, foot);
  grid.append(card);
  cards[name] = { card, badge, text, foot };
}
cards.answer.text.setAttribute("aria-live", "polite");
const bar = make("div", "meter");
const fill = make("div", "fill");
bar.append(fill);
const confidence = make("span", "confidence");
cards.answer.foot.append(confidence, bar);
root.replaceChildren(head, grid);

const plain = (text) => (text || "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();

function update() {
  const value = props.value || { stage: "idle", references: {} };
  root.dataset.stage = value.stage;
  question.textContent = value.question || "";
  note.textContent = value.note || "";
  const { text, card } = cards.answer;
  card.setAttribute("aria-busy", value.stage === "answer");
  text.textContent = value.answer || (value.stage === "idle" ? "The answer will be written here." : value.stage === "answer" ? "" : "(no words)");
  const known = value.confidence !== null && value.confidence !== undefined;
  confidence.textContent = known ? "confidence " + Math.round(100 * value.confidence) + " %" : "";
  confidence.title = "How sure the decoder is: the probability that it is right where its sidecar is calibrated, else the mean probability of its tokens.";
  fill.style.width = known ? 100 * value.confidence + "%" : "0";
  for (const name of ["none", "shuffled", "text_only"]) {
    const reference = value.references[name];
    const there = reference !== null && reference !== undefined;
    cards[name].text.textContent = there ? reference || "(no words)" : "";
    cards[name].card.classList.toggle("waiting", !there && value.stage !== "idle");
    const same = there && plain(reference) === plain(value.answer);
    cards[name].card.classList.toggle("same", same);
    cards[name].badge.textContent = same ? "same answer" : "";
  }
}

watch("value", update);
update();
