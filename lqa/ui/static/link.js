// An address that restores what is on the page.
const root = element.querySelector(".lqa-link");
const box = make("input");
box.readOnly = true;
box.setAttribute("aria-label", "Link to this chat, span, layer and questions");
const copy = button("copy", "Copy", () => copyText(box.value, copy));
const note = make("span", "note", "Opens this page with this chat, span, layer and questions. They are in the link itself; nothing is stored.");
root.append(box, copy, note);
function update() {
  const before = root.hidden;
  root.hidden = !props.value;
  box.value = props.value || "";
  if (!root.hidden && (before || document.activeElement !== box)) { box.select(); }
}
watch("value", update);
root.hidden = true;
update();
