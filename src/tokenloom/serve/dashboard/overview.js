// The first view: what the engine does now.

import { lines, stacked } from "./charts.js";
import { byId, bytes, clock, count, describe, h, ms, patch, percent, rate, say, seconds } from "./dom.js";
import { drawMap } from "./kvmap.js";

const SPAN_S = 120;
const RATE_S = 5;
const KINDS = [
  { key: "prefill", name: "Prefill", color: "--prefill" },
  { key: "decode", name: "Decode", color: "--decode" },
  { key: "drafted", name: "Drafted", color: "--drafted" },
  { key: "training", name: "Training", color: "--training" },
];
const NOTHING = { prefill: 0, decode: 0, drafted: 0, training: 0, iterations: 0, busy_ms: 0 };

/** Seconds by their number; the server sends each one once. */
const history = new Map();
const totals = []; // [at_s, totals] of the last snapshots
const latencies = { ttft: [], itl: [] };

function tile(name) {
  const [figure, small] = [h("span"), h("small")];
  const value = h("p", { className: "value" }, figure, small);
  const more = h("p", { className: "more" });
  byId("tiles").append(h("div", { className: "tile" }, h("p", { className: "name", textContent: name }), value, more));
  return (number, unit, text, mood = "") => {
    say(figure, number);
    say(small, unit ? ` ${unit}` : "");
    say(more, text);
    more.className = `more ${mood}`;
  };
}

const tiles = {
  output: tile("Output"),
  prompt: tile("Prompts"),
  requests: tile("Requests"),
  ttft: tile("First token, p90"),
  itl: tile("Between tokens, p90"),
  training: tile("Training"),
};

/** How much a counter grew in a second, over the last few. */
function perSecond(name) {
  const [first, last] = [totals[0], totals[totals.length - 1]];
  const passed = last[0] - first[0];
  return passed > 0 ? Math.max(0, last[1][name] - first[1][name]) / passed : 0;
}

function showTiles(snapshot) {
  const all = snapshot.totals;
  tiles.output(rate(perSecond("generation_tokens")), "tokens/s", `${count(all.generation_tokens)} in all`);
  const reused = all.prefix_queries_tokens ? all.prefix_hits_tokens / all.prefix_queries_tokens : 0;
  tiles.prompt(rate(perSecond("prompt_tokens")), "tokens/s", `${percent(reused)} found cached`);
  tiles.requests(count(snapshot.running), "running", `${count(snapshot.waiting)} waiting`);
  for (const name of ["ttft", "itl"]) {
    const { p90_ms, target_ms, within } = snapshot[name];
    const mood = within === null ? "" : within >= 0.95 ? "good" : "bad";
    const [number, ...unit] = ms(p90_ms).split(" ");
    tiles[name](number, unit.join(" "), within === null ? `target ${ms(target_ms)}` : `${percent(within)} within ${ms(target_ms)}`, mood);
  }
  const losses = snapshot.trainings.map(({ loss }) => loss).filter((loss) => loss !== null);
  let training = `${count(all.training_steps)} steps in all`;
  if (snapshot.profiling) training = "measuring this machine first";
  else if (losses.length) training = `loss ${losses[0].toFixed(3)}, step ${count(snapshot.trainings[0].step)}`;
  else if (snapshot.coserve === "off") training = "off on this server";
  tiles.training(rate(perSecond("training_tokens")), "tokens/s", training);
}

const legendValues = {};
const when = h("span", { className: "when" });
for (const { key, name } of KINDS) {
  legendValues[key] = h("b");
  byId("rows-legend").append(h("span", {}, h("i", { className: `k-${key}` }), name, legendValues[key]));
}
byId("rows-legend").append(when);

let shown = [];
let hovered = null;
const rows = stacked(byId("rows-chart"), KINDS, (index) => {
  hovered = index;
  showLegend();
});

// What the pointer finds by hovering, the keyboard finds by a slider over the same seconds.
const moment = byId("rows-moment");
moment.max = SPAN_S - 1;
const sayMoment = () => shown.length && moment.setAttribute("aria-valuetext", inWords(shown[moment.valueAsNumber]));
moment.addEventListener("focus", () => {
  moment.value = SPAN_S - 1;
  sayMoment();
});
moment.addEventListener("input", () => {
  rows.point(moment.valueAsNumber);
  sayMoment();
});
moment.addEventListener("blur", () => rows.point(null));

// An iteration counts where it ends, and may have begun before.
const busy = (second) => percent(Math.min(1, second.busy_ms / 1000));
const listed = (second) => KINDS.map(({ key, name }) => `${name} ${second[key]}`).join(", ");
const inWords = (second) => `${clock(second.at_s)}: ${listed(second)}, busy ${busy(second)}`;

function showLegend() {
  const at = hovered === null ? shown.length - 1 : hovered;
  const second = shown[at];
  if (!second) return;
  for (const { key } of KINDS) say(legendValues[key], count(second[key]));
  say(when, `${clock(second.at_s)} · ${count(second.iterations)} iterations, busy ${busy(second)}`);
}

function showRows(snapshot) {
  const last = Math.floor(snapshot.at_s) - 1;
  shown = Array.from({ length: SPAN_S }, (_, i) => {
    const at_s = last - SPAN_S + 1 + i;
    return history.get(at_s) ?? { ...NOTHING, at_s };
  });
  rows.set(
    shown.map(({ at_s }) => at_s),
    KINDS.map(({ key }) => shown.map((second) => second[key])),
  );
  showLegend();
  const sums = Object.fromEntries(KINDS.map(({ key }) => [key, shown.reduce((sum, second) => sum + second[key], 0)]));
  describe(byId("rows-chart"), `Rows at ${inWords(shown.at(-1))}. In the last two minutes: ${listed(sums)}`);
}

const QUANTILES = ["p50", "p90", "p99"];

function latencyPanel(name, title) {
  const within = h("span");
  const chart = h("div", { className: "chart", role: "img", "aria-label": title });
  const values = Object.fromEntries([...QUANTILES, "target"].map((key) => [key, h("dd")]));
  const pairs = Object.entries(values).map(([key, dd]) => h("div", {}, h("dt", {}, h("i", { className: `l-${key}` }), key), dd));
  byId("latency").append(
    h("div", { className: "latency" }, h("div", { className: "head" }, h("h3", { textContent: title }), within), chart, h("dl", {}, ...pairs)),
  );
  const set = lines(
    chart,
    // Told apart by their dashes, too.
    [{ color: "--decode" }, { color: "--prefill", dash: [9, 3] }, { color: "--training", dash: [2, 3] }, { color: "--bad", dash: [5, 4] }],
  );
  return (latency) => {
    const past = latencies[name];
    // A target far above what happens would flatten the lines; its number stands below.
    const highest = Math.max(...past.map(({ p99_ms }) => p99_ms ?? 0));
    const target = latency.target_ms < highest * 3 ? latency.target_ms : null;
    const ys = QUANTILES.map((key) => past.map((point) => point[`${key}_ms`]));
    set(past.map((point) => point.at_s), [...ys, past.map(() => target)]);
    for (const key of QUANTILES) say(values[key], ms(latency[`${key}_ms`]));
    say(values.target, ms(latency.target_ms));
    const share = latency.count ? `${percent(latency.within)} of ${count(latency.count)} on target` : "nothing in the last minute";
    say(within, share);
    describe(chart, `${title}: ${Object.entries(values).map(([key, dd]) => `${key} ${dd.textContent}`).join(", ")}; ${share}`);
    within.className = !latency.count ? "" : latency.within >= 0.95 ? "good" : "bad";
  };
}

const showLatency = {
  ttft: latencyPanel("ttft", "To the first token"),
  itl: latencyPanel("itl", "Between tokens"),
};

const BLOCKS = [
  ["running", "Requests", "k-decode"],
  ["cached", "Cached prefixes", "k-cached"],
  ["training", "Training", "k-training"],
  ["free", "Free", "k-free"],
];
const blockValues = {};
for (const [key, name, kind] of BLOCKS) {
  blockValues[key] = h("b");
  byId("kv-legend").append(h("span", {}, h("i", { className: kind }), name, blockValues[key]));
}

function showBlocks({ blocks }) {
  const held = (blocks.running + blocks.training) / blocks.total;
  say(byId("kv-size"), `${percent(held)} of ${count(blocks.total)} blocks in use · ${bytes(blocks.bytes)}`);
  for (const [key] of BLOCKS) say(blockValues[key], count(blocks[key]));
  drawMap(byId("kv-map"), blocks.map);
  const parts = BLOCKS.map(([key, name]) => `${name} ${blocks[key]}`);
  describe(byId("kv-map"), `Map of the KV pool, ${blocks.total} blocks, ${percent(held)} in use: ${parts.join(", ")}`);
}

function requestRow(request) {
  const most = request.max_tokens === null ? null : request.max_tokens * request.choices;
  const methods = [request.adapter, request.kv && `kv ${request.kv}`, request.draft && `draft ${request.draft}`].filter(Boolean);
  const names = methods.map((spec) => spec.replaceAll(/\([^()]*\)/g, "")); // knobs are told by the title
  const prompt = request.state === "prefill" ? `${count(request.computed_tokens)} of ${count(request.prompt_tokens)}` : count(request.prompt_tokens);
  const cached = request.cached_tokens ? h("span", { className: "sub", textContent: ` · ${count(request.cached_tokens)} cached` }) : null;
  const output = h("td", { className: "number" }, most === null ? count(request.output_tokens) : `${count(request.output_tokens)} / ${count(most)}`);
  if (most) output.append(h("progress", { max: most, value: request.output_tokens, "aria-hidden": "true" }));
  const state = h("span", { className: "chip", "data-state": request.state, textContent: request.state });
  return h(
    "tr",
    {},
    h("td", { className: "mono", title: request.id, textContent: request.id.slice(0, 8) }),
    h("td", {}, state, request.choices > 1 ? h("span", { className: "sub", textContent: ` ×${request.choices}` }) : null),
    h("td", { className: "number" }, prompt, cached),
    output,
    h("td", { className: "number optional", textContent: request.ttft_s === null ? "–" : ms(request.ttft_s * 1000) }),
    h("td", { className: "number optional", textContent: seconds(request.age_s) }),
    h("td", { className: "number optional", textContent: count(request.kv_blocks) }),
    h("td", { className: "clip optional", title: methods.join(" · "), textContent: names.join(" · ") || "–" }),
  );
}

function showRequests(snapshot) {
  patch(byId("requests"), snapshot.requests.map(requestRow));
  const more = snapshot.num_requests - snapshot.requests.length;
  say(byId("requests-count"), `${count(snapshot.running)} running, ${count(snapshot.waiting)} waiting${more > 0 ? `; ${count(more)} not shown` : ""}`);
  byId("no-requests").hidden = snapshot.num_requests > 0;
}

/** Remembers what comes once: also while another view is shown. */
export function remember(snapshot) {
  for (const second of snapshot.seconds) history.set(second.at_s, second);
  for (const at of history.keys()) if (at < snapshot.at_s - SPAN_S - 2) history.delete(at);
  totals.push([snapshot.at_s, snapshot.totals]);
  while (totals.length > 2 && totals[0][0] < snapshot.at_s - RATE_S) totals.shift();
  for (const [name, past] of Object.entries(latencies)) {
    past.push({ at_s: snapshot.at_s, ...snapshot[name] });
    while (past[0].at_s < snapshot.at_s - SPAN_S) past.shift();
  }
}

/** Shows a snapshot that has been remembered. */
export function showOverview(snapshot) {
  showTiles(snapshot);
  showRows(snapshot);
  for (const name of ["ttft", "itl"]) showLatency[name](snapshot[name]);
  showBlocks(snapshot);
  showRequests(snapshot);
}
