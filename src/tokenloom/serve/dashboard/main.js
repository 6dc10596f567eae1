// Puts the page together: views by the address's fragment, the key, the feed.

import { onUnauthorized, setKey } from "./api.js";
import { byId, say } from "./dom.js";
import { follow } from "./feed.js";
import { showJobs } from "./jobs.js";
import { followAdapters, showModels } from "./models.js";
import { remember, showOverview } from "./overview.js";
import { offerMethods, tryModel } from "./playground.js";

const VIEWS = ["overview", "playground", "finetuning", "models"];
const STATES = { live: "Live", lost: "Connection lost", draining: "Stopping", connecting: "Connecting", paused: "Paused" };
let paused = false;
let newest = null;
let shownView = "";

function showView() {
  const [asked, query] = location.hash.slice(1).split("?");
  const view = VIEWS.includes(asked) ? asked : "overview";
  for (const name of VIEWS) {
    byId(`view-${name}`).hidden = name !== view;
    const link = document.querySelector(`.views a[href="#${name}"]`);
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  shownView = view;
  document.title = `${document.querySelector(`.views a[href="#${view}"]`).textContent} · tokenloom`;
  const model = new URLSearchParams(query).get("model");
  if (view === "playground" && model) tryModel(model);
  showJobs(view === "finetuning");
  if (view === "models") showModels().catch(console.error);
  // Charts have no size while they are hidden.
  if (view === "overview" && newest && !paused) requestAnimationFrame(() => showOverview(newest));
}

function showState(state) {
  const shown = paused && state === "live" ? "paused" : state;
  byId("status").dataset.state = shown;
  say(byId("status"), STATES[shown]);
}

/** One question at a time, however many requests were refused. */
let asking = null;
function askForKey(problem, refused) {
  if (refused && refused !== sessionStorage.getItem("tokenloom-key")) return Promise.resolve(); // it is another by now
  asking ??= new Promise((resolve) => {
    say(byId("key-problem"), problem);
    byId("key").setAttribute("aria-invalid", String(Boolean(problem)));
    const dialog = byId("key-dialog");
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey(byId("key").value.trim());
      byId("key").value = "";
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

byId("pause").addEventListener("click", ({ currentTarget }) => {
  paused = !paused;
  currentTarget.setAttribute("aria-pressed", String(paused));
  showState("live");
  if (!paused && newest) showOverview(newest);
});

byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without a key
onUnauthorized(askForKey);
addEventListener("hashchange", () => {
  showView();
  byId(`title-${shownView}`).focus({ preventScroll: true }); // which says where one is
  scrollTo(0, 0);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment is the view's name
  byId("main").focus();
});
showView();
follow((snapshot) => {
  newest = snapshot;
  remember(snapshot);
  say(byId("model-name"), snapshot.model);
  followAdapters(snapshot.adapters);
  if (!paused && !byId("view-overview").hidden) showOverview(snapshot);
}, showState);
offerMethods().catch(console.error);
