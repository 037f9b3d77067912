// Live state: asks the server once a second and shows what it says. Gradio's connection is not needed for it, so a server
// that was ended and started again is found without a reload.
window.kit = (() => {
  let followed = new URLSearchParams(location.hash.slice(1)).get("run") || "";
  const shown = {};

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
      const answer = await fetch("live?run=" + encodeURIComponent(followed), { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      const said = await answer.json();
      put("live", said.card);
      put("history", said.history);
      document.body.classList.remove("kit-away");
    } catch (fault) {
      document.body.classList.add("kit-away");
    }
  };

  const follow = (name) => {
    if (!name) return;
    followed = name;
    history.replaceState(null, "", "#run=" + encodeURIComponent(name));
    look();
  };

  const act = async (button) => {
    const { do: verb, run } = button.dataset;
    if (verb === "show") return follow(run);
    button.disabled = true;
    const answer = await fetch("act", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ do: verb, run }),
    }).catch(() => null);
    const said = answer && (await answer.json().catch(() => ({})));
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
  setInterval(() => { if (!document.hidden) look(); }, 1000);
  return { follow, look };
})();
