// A sentence that says what is wrong.  It goes into the page by textContent only.
const root = element.querySelector(".lqa-notice");
root.setAttribute("role", "alert");

function update() {
  root.textContent = props.value || "";
  root.hidden = !props.value;
}

watch("value", update);
update();
