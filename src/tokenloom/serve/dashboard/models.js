// The models view, and the names that the playground offers.

import { get } from "./api.js";
import { byId, h, patch } from "./dom.js";
import { offerModels } from "./playground.js";

let loaded = new Map(); // name to version, of the last snapshot
let known = "";

function kind({ id, parent }) {
  if (!parent) return "Base model";
  if (!id.startsWith("ft:")) return "Adapter";
  return id.includes(":ckpt-step-") ? "Checkpoint" : "Fine-tuned";
}

function row(model) {
  const version = loaded.get(model.id);
  const memory = !model.parent ? "always" : version === undefined ? "when asked for" : `yes, version ${version}`;
  const attempt = h("a", { href: `#playground?model=${encodeURIComponent(model.id)}`, "aria-label": `Try ${model.id}`, textContent: "Try" });
  return h(
    "tr",
    {},
    h("td", { className: "mono clip", title: model.id, textContent: model.id }),
    h("td", { textContent: kind(model) }),
    h("td", { className: "optional", textContent: model.parent ?? "–" }),
    h("td", { textContent: memory }),
    h("td", { className: "optional", textContent: new Date(model.created * 1000).toLocaleString("en-GB") }),
    h("td", {}, attempt),
  );
}

/** Asks for the models; `onError` gets what went wrong. */
export async function showModels() {
  const { data } = await get("/v1/models");
  patch(byId("models"), data.map(row));
  offerModels(data.map(({ id }) => id));
}

/** Follows what is in memory; the list is asked for anew when that changes. */
export function followAdapters(adapters) {
  const now = JSON.stringify(adapters);
  if (now === known) return;
  known = now;
  loaded = new Map(adapters.map(({ name, version }) => [name, version]));
  showModels().catch(console.error);
}
