// In front of every component's script.  Text goes into the page by textContent and value only.
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
}
function button(className, text, onclick) {
  const node = make("button", className, text);
  node.type = "button";
  node.onclick = onclick;
  return node;
}
function set(node, text) {  // touches the page only where something changes
  text = text ?? "";
  if (node.textContent !== text) node.textContent = text;
}
function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
// Whitespace made visible; what several tokens share (the bytes of one character) is shown by the first of them.
function drawToken(node, text) {
  if (!text) { node.append(make("i", "", "‥")); return; }
  for (const part of text.split(/([ \n\t])/)) {
    if (!part) continue;
    const mark = { " ": "·", "\n": "↵", "\t": "⇥" }[part];
    node.append(mark ? make("i", "", mark) : document.createTextNode(part));
  }
}
async function copyText(text, node) {
  try { await navigator.clipboard.writeText(text); }
  catch {  // not a secure context, or not allowed
    const box = make("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  const label = node.dataset.label || (node.dataset.label = node.textContent);
  node.textContent = "Copied";
  clearTimeout(node.timer);
  node.timer = setTimeout(() => { node.textContent = label; }, 1500);
}
