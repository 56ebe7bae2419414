// Asks the server for newer contents every few seconds and draws the page anew where there are some.
(function () {
"use strict";

const page = window.flowgrove, EVERY = 3000; // milliseconds
const status = page.make("p", { id: "live", role: "status" });
document.body.prepend(status);
let tag = null, held = false;

// Under a hand nothing is drawn anew: a slider would be lost while it is moved.
document.addEventListener("pointerdown", () => { held = true; });
for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { held = false; });

function say(reached) {
  const now = new Date().toLocaleTimeString();
  if (reached) status.textContent = `Live: as of ${now}`;
  else if (status.className !== "lost") status.textContent = `Not reached since ${now}: the command has ended, or the way to it. This is what it told last.`;
  status.className = reached ? "" : "lost";
}

async function refresh() {
  if (document.hidden || held) return;
  try {
    const answer = await fetch("/data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      const runs = await answer.json();
      page.render(runs);
      tag = answer.headers.get("ETag");
    }
    say(answer.ok || answer.status === 304);
  } catch {
    say(false);
  }
}

async function watch() {
  await refresh();
  setTimeout(watch, EVERY);
}

document.addEventListener("visibilitychange", refresh);
watch();
})();
