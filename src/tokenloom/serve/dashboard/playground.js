// The playground: one message, answered in two columns that may differ in model and methods.

import { events, get, send } from "./api.js";
import { announce, byId, count, h, ms, rate, turnOff } from "./dom.js";
import { Answer, compare } from "./tokens.js";

const ALTERNATIVES = 5;
const MOST_SAID = 400; // characters of an answer that are read out
let models = [];
let wanted = null;
let running = null;

/** One column: its choices, its conversation, and what its last answer took. */
class Column {
  constructor(letter) {
    this.letter = letter;
    this.messages = [];
    this.model = h("select", { "aria-label": `Model of ${letter}` });
    this.kv = h("input", { type: "text", placeholder: "server's own", autocomplete: "off", spellcheck: false, "aria-label": `KV method of ${letter}` });
    this.draft = h("input", { type: "text", placeholder: "server's own", autocomplete: "off", spellcheck: false, "aria-label": `Draft method of ${letter}` });
    this.kv.setAttribute("list", "kv-methods");
    this.draft.setAttribute("list", "draft-methods");
    this.talk = h("div", { className: "talk", tabIndex: 0, role: "log", "aria-live": "off", "aria-label": `Conversation ${letter}` });
    this.stats = h("div", { className: "stats" });
    this.element = h(
      "section",
      { className: "column coloured", "aria-label": `Answer ${letter}` },
      h("h2", { className: "hidden", textContent: `Answer ${letter}` }),
      h("header", {}, h("span", { className: "letter", textContent: letter, "aria-hidden": "true" }),
        h("label", {}, "Model", this.model), h("label", {}, "KV method", this.kv), h("label", {}, "Draft", this.draft)),
      this.talk,
      this.stats,
    );
    this.clear();
  }

  offer(names) {
    const chosen = this.model.value;
    this.model.replaceChildren(...names.map((name) => h("option", { value: name, textContent: name })));
    if (names.includes(chosen)) this.model.value = chosen;
  }

  clear() {
    this.messages = [];
    this.talk.replaceChildren(h("p", { className: "empty", textContent: "Answers appear here as they are written." }));
    this.stats.replaceChildren();
  }

  #body(settings) {
    const body = {
      model: this.model.value,
      messages: [...(settings.system ? [{ role: "system", content: settings.system }] : []), ...this.messages],
      temperature: settings.temperature,
      max_tokens: settings.maxTokens,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (settings.seed !== null) body.seed = settings.seed;
    if (settings.colour) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
    if (this.kv.value.trim()) body.kv = this.kv.value.trim();
    if (this.draft.value.trim()) body.draft = this.draft.value.trim();
    return body;
  }

  /** Asks, and shows the answer as it comes; resolves to it. */
  async ask(text, settings, signal) {
    if (!this.messages.length) this.talk.replaceChildren();
    this.messages.push({ role: "user", content: text });
    const answer = new Answer();
    this.talk.append(h("div", { className: "user", textContent: text }), answer.element);
    this.stats.replaceChildren("…");
    const began = performance.now();
    let first = null;
    let last = began;
    let usage = null;
    try {
      const body = JSON.stringify(this.#body(settings));
      const options = { method: "POST", body, headers: { "Content-Type": "application/json" }, signal };
      for await (const data of events(await send("/v1/chat/completions", options))) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        if (!choice?.delta?.content && !choice?.logprobs) continue;
        last = performance.now();
        first ??= last;
        const atEnd = this.talk.scrollTop + this.talk.clientHeight > this.talk.scrollHeight - 40;
        answer.add(choice.delta.content ?? "", choice.logprobs?.content);
        if (atEnd) this.talk.scrollTop = this.talk.scrollHeight;
      }
      answer.finish();
    } catch (error) {
      answer.fail(error.name === "AbortError" ? "stopped" : error.message);
      if (!answer.text) this.messages.pop();
    }
    if (answer.text) this.messages.push({ role: "assistant", content: answer.text });
    this.#tell(usage, began, first, last);
    return answer;
  }

  #tell(usage, began, first, last) {
    const facts = [];
    const add = (name, value) => facts.push(h("span", {}, `${name} `, h("b", { textContent: value })));
    if (first !== null) add("First token", ms(first - began));
    if (usage) {
      const tokens = usage.completion_tokens;
      if (tokens > 1 && last > first) add("Speed", `${rate(((tokens - 1) * 1000) / (last - first))} tokens/s`);
      add("Tokens", `${count(usage.prompt_tokens)} + ${count(tokens)}`);
      const cached = usage.prompt_tokens_details?.cached_tokens;
      if (cached) add("Cached", count(cached));
      const guesses = usage.completion_tokens_details;
      if (guesses?.draft_passes) {
        const accepted = guesses.accepted_prediction_tokens;
        add("Guesses taken", `${count(accepted)} of ${count(accepted + guesses.rejected_prediction_tokens)}`);
      }
    }
    this.stats.replaceChildren(...facts);
  }

  note(text) {
    this.stats.append(h("span", { textContent: text }));
  }
}

const columns = [new Column("A"), new Column("B")];
byId("columns").append(...columns.map(({ element }) => element));
const both = () => columns.slice(0, byId("compare").checked ? 2 : 1);

function settings() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  return {
    temperature: number("temperature") ?? 1,
    maxTokens: number("max-tokens") ?? 200,
    seed: number("seed"),
    system: byId("system").value.trim(),
    colour: byId("colour").checked,
  };
}

async function ask(text) {
  running = new AbortController();
  turnOff(byId("send"), true);
  turnOff(byId("stop"), false);
  announce("Answering");
  const asked = both();
  const answers = await Promise.all(asked.map((column) => column.ask(text, settings(), running.signal)));
  const same = answers.length === 2 && answers[0].text === answers[1].text && !answers[1].problem;
  if (answers.length === 2 && answers.every(({ text: said }) => said)) tellDifference(answers, same);
  running = null;
  turnOff(byId("send"), false);
  turnOff(byId("stop"), true);
  answers.forEach((answer, i) => announce(`Answer ${asked[i].letter}: ${i && same ? "same text as A" : inWords(answer)}`));
}

/** What is read out once an answer is there: word by word as it is written nobody could listen. */
function inWords({ text, problem }) {
  const said = text.length > MOST_SAID ? `${text.slice(0, MOST_SAID)}… and more` : text;
  return problem ? `${said} failed: ${problem}`.trim() : said;
}

function tellDifference(answers, same) {
  const known = answers.every(({ entries }) => entries.length);
  const at = known && !same ? compare(...answers) : 0;
  columns[1].note(same ? "Same text as A" : at ? `Parts from A at token ${at}` : "Another text than A");
}

/** Gives the names that the columns can choose from. */
export function offerModels(names) {
  models = names;
  for (const column of columns) column.offer(models);
  takeWanted();
}

/** Puts a model into the second column, beside the first. */
export function tryModel(name) {
  wanted = name;
  takeWanted();
}

function takeWanted() {
  if (wanted === null || !models.includes(wanted)) return;
  byId("compare").checked = true;
  showColumns();
  columns[1].model.value = wanted;
  wanted = null;
}

function showColumns() {
  const two = byId("compare").checked;
  columns[1].element.hidden = !two;
  byId("columns").classList.toggle("one", !two);
}

/** Offers the methods' names where specs are written. */
export async function offerMethods() {
  const { data } = await get("/v1/methods");
  for (const hook of ["kv", "draft"]) {
    const names = data.filter((method) => method.hook === hook);
    const options = [{ name: "off", claim: "none" }, ...names].map(({ name, claim }) => h("option", { value: name, label: `${name}: ${claim}` }));
    document.body.append(h("datalist", { id: `${hook}-methods` }, ...options));
  }
}

byId("compare").addEventListener("change", showColumns);
byId("colour").addEventListener("change", ({ target }) => {
  for (const { element } of columns) element.classList.toggle("coloured", target.checked);
  byId("probabilities").hidden = !target.checked;
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text || running) return;
  byId("prompt").value = "";
  ask(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  for (const column of columns) column.clear();
  byId("prompt").focus();
});
