// The fine-tuning view: jobs, the loss of one of them, and what can be done with it.

import { get, post } from "./api.js";
import { lines } from "./charts.js";
import { announce, byId, clock, count, describe, h, patch, say, seconds } from "./dom.js";
import { openJobForm } from "./jobform.js";

const EVERY_MS = 1000;
const PAGE = 1000;
const ACTIONS = {
  validating_files: ["cancel"],
  queued: ["pause", "cancel"],
  running: ["pause", "cancel"],
  paused: ["resume", "cancel"],
};

let jobs = [];
let chosen = null;
/** Steps and events of the chosen job, as far as they are known. */
let log = null;
let setLoss = null;
let visible = false;
let told = "";
const statuses = new Map(); // by job, as they were seen last

const path = (id, rest = "") => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}${rest}`;
const inWords = (status) => status.replace("_", " ");
const title = (job) => job.fine_tuned_model ?? job.metadata?.name ?? job.id;

function note(text) {
  if (text && byId("jobs-note").textContent !== text) announce(text);
  byId("jobs-note").hidden = !text;
  say(byId("jobs-note"), text);
}

/** What a row of the list says; rows are rebuilt when it changes, so that the focus stays where it is else. */
function listed(job) {
  const progress = job.id === chosen && log?.total ? ` · step ${log.last} of ${log.total}` : "";
  return [job.id, title(job), job.status, `${clock(job.created_at)} · ${job.model}${progress}`];
}

function showList() {
  const rows = jobs.map(listed);
  const now = JSON.stringify([rows, chosen]);
  if (now === told) return;
  told = now;
  const focused = document.activeElement?.dataset?.job;
  const items = rows.map(([id, name, status, sub]) => {
    const button = h(
      "button",
      { type: "button", onclick: () => choose(id), "aria-current": id === chosen ? "true" : null },
      h("span", { className: "title", textContent: name }),
      h("span", { className: "chip", "data-state": status, textContent: inWords(status) }),
      h("span", { className: "sub", textContent: sub }),
    );
    button.dataset.job = id;
    return h("li", {}, button);
  });
  byId("jobs").replaceChildren(...items);
  if (focused) byId("jobs").querySelector(`[data-job="${CSS.escape(focused)}"]`)?.focus();
  if (!rows.length) byId("jobs").replaceChildren(h("li", { className: "empty", textContent: "No jobs yet." }));
}

async function refresh() {
  try {
    jobs = (await get("/v1/fine_tuning/jobs?limit=50")).data;
    note("");
  } catch (error) {
    note(error.message);
    return;
  }
  for (const job of jobs) {
    const before = statuses.get(job.id);
    if (before && before !== job.status) announce(`Job ${title(job)}: ${inWords(job.status)}`);
    statuses.set(job.id, job.status);
  }
  if (!chosen && jobs.length) chosen = jobs[0].id;
  if (chosen) await refreshLog();
  showList();
  showJob();
}

/** Takes in what has happened since the last time; events come newest first. */
async function refreshLog() {
  const id = chosen;
  if (log?.id !== id) log = { id, steps: new Map(), valid: new Map(), events: new Map(), last: 0, total: 0, status: "" };
  const here = log;
  const job = jobs.find((one) => one.id === id);
  if (!job || (here.status === job.status && !(job.status in ACTIONS))) return;
  for (let after = ""; ; ) {
    const page = await get(path(id, `/events?limit=${here.events.size ? 100 : PAGE}${after && `&after=${after}`}`));
    const known = page.data.some((event) => here.events.has(event.id));
    for (const event of page.data) {
      here.events.set(event.id, event);
      if (event.type !== "metrics") continue;
      here.steps.set(event.data.step, event.data.train_loss);
      here.last = Math.max(here.last, event.data.step);
      here.total = event.data.total_steps ?? here.total;
    }
    if (known || !page.has_more) break;
    after = page.data[page.data.length - 1].id;
  }
  for (const { step_number, metrics } of (await get(path(id, "/checkpoints?limit=100"))).data) {
    const loss = metrics.full_valid_loss ?? metrics.valid_loss;
    if (typeof loss === "number") here.valid.set(step_number, loss);
  }
  here.status = job.status;
}

function choose(id) {
  chosen = id;
  told = "";
  showList();
  refresh();
}

async function act(id, what) {
  try {
    await post(path(id, `/${what}`));
  } catch (error) {
    note(error.message);
    return;
  }
  if (log) log.status = ""; // ask once more what happened
  await refresh();
}

function fact(name, value, className = "") {
  return value === null || value === undefined ? null : h("div", { className }, h("dt", { textContent: name }), h("dd", { textContent: value }));
}

function showJob() {
  const job = jobs.find((one) => one.id === chosen);
  byId("no-job").hidden = Boolean(job);
  byId("job-body").hidden = !job;
  if (!job) return;
  say(byId("job-title"), title(job));
  byId("job-status").className = "chip";
  byId("job-status").dataset.state = job.status;
  say(byId("job-status"), inWords(job.status));
  showActions(job);
  showLoss();
  const { hyperparameters: numbers, training, lora, error } = job;
  const left = job.estimated_finish ? Math.max(0, job.estimated_finish - Date.now() / 1000) : null;
  patch(
    byId("job-facts"),
    [
      fact("Step", log.total ? `${count(log.last)} of ${count(log.total)}` : log.last || null),
      fact("Time left", job.status === "running" && left !== null ? seconds(left) : null),
      fact("Tokens trained", job.trained_tokens === null ? null : count(job.trained_tokens)),
      fact("Epochs", numbers.n_epochs),
      fact("Batch size", numbers.batch_size),
      fact("Learning rate", training.learning_rate),
      fact("LoRA rank", lora.r),
      fact("Failed", error && `${error.code}: ${error.message}`, "long"),
      fact("Job", title(job) === job.id ? null : job.id, "long"),
    ].filter(Boolean),
  );
  showEvents();
}

function showActions(job) {
  const wanted = ACTIONS[job.status] ?? [];
  const box = byId("job-actions");
  const now = `${job.id} ${wanted}`;
  if (box.dataset.now === now) return;
  box.dataset.now = now;
  const focused = box.contains(document.activeElement);
  const names = { pause: "Pause", resume: "Resume", cancel: "Cancel" };
  box.replaceChildren(
    ...wanted.map((what) =>
      h("button", { type: "button", className: `small ${what === "cancel" ? "danger" : ""}`, textContent: names[what], onclick: () => act(job.id, what) }),
    ),
  );
  if (focused) (box.firstElementChild ?? byId("job-title")).focus();
}

function showLoss() {
  setLoss ??= lines(byId("loss-chart"), [{ color: "--training" }, { color: "--drafted", points: true }], { x: "step" });
  const steps = [...new Set([...log.steps.keys(), ...log.valid.keys()])].sort((a, b) => a - b);
  const ys = [log.steps, log.valid].map((losses) => steps.map((step) => losses.get(step) ?? null));
  setLoss(steps, ys);
  const newest = (losses) => (losses.size ? losses.get(Math.max(...losses.keys())) : null);
  const [train, valid] = [newest(log.steps), newest(log.valid)];
  byId("loss-legend").replaceChildren(
    h("span", {}, h("i", { className: "k-training" }), "Training loss", h("b", { id: "train-loss", textContent: train === null ? "–" : train.toFixed(4) })),
    ...(valid === null ? [] : [h("span", {}, h("i", { className: "k-drafted" }), "Validation loss", h("b", { textContent: valid.toFixed(4) }))]),
  );
  const first = log.steps.get(Math.min(...log.steps.keys()));
  const said = log.steps.size ? `from ${first.toFixed(3)} to ${train.toFixed(3)} after ${log.last} steps` : "no step is done yet";
  const checked = valid === null ? "" : `. Validation loss ${valid.toFixed(3)}`;
  describe(byId("loss-chart"), `Training loss: ${said}${checked}`, log.id);
}

function showEvents() {
  const events = [...log.events.values()].filter(({ type }) => type !== "metrics");
  const box = byId("job-events");
  if (box.dataset.now === `${log.id} ${events.length}`) return;
  box.dataset.now = `${log.id} ${events.length}`;
  events.sort((a, b) => b.created_at - a.created_at);
  box.replaceChildren(
    ...events.map(({ created_at, level, message }) =>
      h("li", {}, h("time", { textContent: clock(created_at) }), h("span", { className: level, textContent: message })),
    ),
  );
}

/** `isVisible` follows the view: jobs are asked after while it is shown. */
export function showJobs(isVisible) {
  visible = isVisible;
  if (visible) refresh();
}

async function poll() {
  if (visible && !document.hidden) await refresh().catch((error) => note(error.message));
  setTimeout(poll, EVERY_MS);
}

byId("new-job").addEventListener("click", () => openJobForm(choose));
poll();
