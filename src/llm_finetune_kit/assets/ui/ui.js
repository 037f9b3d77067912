// Live state: asks the server once a second and shows what it says. Gradio's connection is not needed for it, so a server
// that was ended and started again is found without a reload.
window.kit = (() => {
  let followed = new URLSearchParams(location.hash.slice(1)).get("run") || "";
  const shown = {};
  const pressed = {}; // by run: the state in which its button was pressed, what it says meanwhile, and until when
  let known = null; // run and state as they were last told

  const put = (id, html) => {
    const place = document.getElementById(id);
    if (!place || (shown[id] === html && place.innerHTML)) return;
    const open = [...place.querySelectorAll("details")].map((one) => one.open);
    const focus = place.contains(document.activeElement) && document.activeElement;
    const again = focus && focus.dataset && [focus.dataset.do, focus.dataset.run];
    place.innerHTML = html;
    const now = [...place.querySelectorAll("details")];
    if (now.length === open.length) now.forEach((one, index) => { one.open = open[index]; });
    if (again) [...place.querySelectorAll("button")].find((one) => one.dataset.do === again[0] && one.dataset.run === again[1])?.focus();
    shown[id] = html;
  };

  const look = async () => {
    try {
      const asked = followed;
      const answer = await fetch("live?run=" + encodeURIComponent(asked), { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      const said = await answer.json();
      if (asked !== followed) return; // another was chosen meanwhile
      if (said.run) followed = said.run; // what is watched stays, whatever begins or fails beside it
      put("live", said.card);
      put("history", said.history);
      wait(said);
      tell(said);
      document.body.classList.remove("kit-away");
    } catch (fault) {
      document.body.classList.add("kit-away");
    }
  };

  // A pressed button says so until the state of its run is another.
  const wait = ({ run, state }) => {
    const one = pressed[run];
    if (!one) return;
    if (one.state === undefined) one.state = state;
    if (one.state !== state || Date.now() > one.until) return delete pressed[run];
    const button = document.querySelector(`#live button[data-do="${one.verb}"]`);
    if (button) { button.disabled = true; button.textContent = one.says; }
  };

  // What became of the watched run, for those who look elsewhere or listen.
  const tell = ({ run, state, status }) => {
    const line = document.getElementById("kit-status");
    if (!line || (known && known.run === run && known.state === state)) return;
    if (!known && ["running", "beginning"].includes(state)) open("Training");
    if (known || state === "running") line.textContent = known && known.run !== run && state !== "running" ? "" : status;
    known = { run, state };
  };

  const open = (tab) => [...document.querySelectorAll('#tabs [role="tab"]')].find((one) => one.textContent.trim() === tab)?.click();

  const follow = (name) => {
    if (!name) return;
    followed = name;
    history.replaceState(null, "", "#run=" + encodeURIComponent(name));
    look();
  };

  const act = async (button) => {
    const { do: verb, run } = button.dataset;
    if (verb === "show") return follow(run);
    if (verb === "open") return open(run);
    button.disabled = true;
    const says = { stop: "Stopping…", resume: "Going on…" }[verb];
    if (says) {
      button.textContent = says;
      pressed[run] = { verb, says, state: known?.run === run ? known.state : undefined, until: Date.now() + (verb === "stop" ? 120000 : 15000) };
    }
    const answer = await fetch("act", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ do: verb, run }),
    }).catch(() => null);
    const said = answer && (await answer.json().catch(() => ({})));
    if (!said || said.error) delete pressed[run];
    if (said && said.error) {
      const line = document.createElement("p");
      line.className = "note";
      line.setAttribute("role", "alert");
      line.textContent = said.error;
      button.parentElement.after(line);
    }
    if (verb === "resume") follow(run);
    else look();
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest(".kit button[data-do]");
    if (button) act(button);
  });
  // Enter in an emptied field means that it is empty; gradio would take the first of its list.
  let moved = false; // with the arrows, to an entry of the list
  document.addEventListener("focusin", () => { moved = false; }, true);
  document.addEventListener("input", () => { moved = false; }, true);
  document.addEventListener("keydown", (event) => {
    const field = event.target;
    if (event.key.startsWith("Arrow")) moved = true;
    if (event.key === "Tab" && field.getAttribute?.("aria-expanded") === "true") { // gradio leaves the list open, and in the way of Tab
      document.querySelectorAll('ul[role="listbox"]').forEach((list) => { list.tabIndex = -1; });
      field.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
      return event.stopImmediatePropagation(); // it opens the list at any other key
    }
    if (event.key !== "Enter" || moved || !field.matches?.('#knob-data-eval_file input, #knob-data-train_file input, #knob-model-name input')) return;
    if (field.value.trim()) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    field.blur();
  }, true);
  setInterval(() => { if (!document.hidden) look(); }, 1000);
  return { follow, look };
})();
