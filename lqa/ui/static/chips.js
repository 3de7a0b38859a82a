// Texts to click, in groups.
const root = element.querySelector(".lqa-chips");
let shown = "";
function update() {
  const value = props.value || { groups: [] }, text = JSON.stringify(value.groups);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", value.name || "");
  if (text === shown) return;
  shown = text;
  root.replaceChildren(...value.groups.map((group, g) => {
    const row = make("div", "group");
    if (group.label) row.append(make("span", "label", group.label));
    group.items.forEach((item, i) => row.append(button("chip", item, () => {
      props.value = { ...props.value, pick: [g, i] };
      trigger("select");
    })));
    return row;
  }));
}
watch("value", update);
update();
