// An answer token by token: how likely each was, and what else was.

import { byId, h } from "./dom.js";

const STEPS = [0.1, 0.3, 0.6, 0.9];
const GAP = 3;
const LEAVE_MS = 200;
let leaving = 0;
const popup = h("div", { className: "alternatives", id: "alternatives", role: "tooltip", hidden: true });
byId("main").append(popup);

/** A token's text with what cannot be seen made visible; bytes that are no text as such. */
function shown({ token, bytes }) {
  if (token === "") return "∅";
  if (/[\p{Cc}\uFFFD]/u.test(token.replaceAll(/[\n\t]/g, ""))) return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");
}

const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(share < 10 ? 1 : 0)} %`;
};

const same = (one, other) => String(one.bytes) === String(other.bytes);

function show(token, entry) {
  const chosen = entry.top_logprobs.some((one) => same(one, entry));
  const all = chosen ? entry.top_logprobs : [...entry.top_logprobs, entry];
  popup.replaceChildren(
    h("table", {}, h("tbody", {}, ...all.map((one) =>
      h("tr", { className: one === entry || same(one, entry) ? "chosen" : "" }, h("td", { textContent: shown(one) }), h("td", { className: "number", textContent: percent(one.logprob) })),
    ))),
  );
  popup.hidden = false;
  clearTimeout(leaving);
  const box = token.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popup;
  const below = box.bottom + GAP + height < innerHeight;
  popup.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  popup.style.top = `${below ? box.bottom + GAP : Math.max(8, box.top - height - GAP)}px`;
  token.setAttribute("aria-describedby", "alternatives");
}

function hide(token) {
  token.removeAttribute("aria-describedby");
  leave();
}

const close = () => (popup.hidden = true);
/** The pointer may go from a token to what is told of it. */
function leave() {
  clearTimeout(leaving);
  leaving = setTimeout(close, LEAVE_MS);
}
popup.addEventListener("mouseenter", () => clearTimeout(leaving));
popup.addEventListener("mouseleave", leave);
addEventListener("keydown", ({ key }) => key === "Escape" && close());
addEventListener("scroll", close, { capture: true, passive: true });

/**
 * An answer as it is written. Without log-probabilities it is plain text; with them a span per token, of which one
 * at a time can be reached by Tab and the others from there by the arrow keys.
 */
export class Answer {
  constructor() {
    this.element = h("div", { className: "answer" });
    this.tokens = [];
    this.entries = [];
    this.text = "";
    this.problem = "";
    this.decoder = new TextDecoder();
    this.element.addEventListener("keydown", (event) => this.#move(event));
    for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
      this.element.addEventListener(enter, ({ target }) => this.#at(target, show));
      this.element.addEventListener(leave, ({ target }) => this.#at(target, hide));
    }
  }

  /** Adds a piece of the text, with its tokens' log-probabilities if they were asked for. */
  add(text, entries) {
    this.text += text;
    if (!entries) {
      this.element.append(text);
      return;
    }
    for (const entry of entries) {
      const step = STEPS.filter((most) => Math.exp(entry.logprob) > most).length;
      const token = h("span", { className: `token p${step}`, tabIndex: this.tokens.length ? -1 : 0 });
      // A token may end within a character, which is then the next one's.
      token.textContent = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
      this.tokens.push(token);
      this.entries.push(entry);
      this.element.append(token);
    }
  }

  /** Takes out what ended the answer: special tokens are no text. */
  finish() {
    while (this.tokens.length && !this.text.endsWith(this.tokens.at(-1).textContent)) {
      this.tokens.pop().remove();
      this.entries.pop();
    }
  }

  fail(message) {
    this.problem = message;
    if (!this.text) this.element.classList.add("failed");
    this.element.append(this.text ? ` [${message}]` : message);
  }

  #at(target, then) {
    const index = this.tokens.indexOf(target);
    if (index >= 0) then(target, this.entries[index]);
  }

  #move(event) {
    const from = this.tokens.indexOf(document.activeElement);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (from < 0 || !by) return;
    const to = Math.max(0, Math.min(this.tokens.length - 1, from + by));
    event.preventDefault();
    this.tokens[from].tabIndex = -1;
    this.tokens[to].tabIndex = 0;
    this.tokens[to].focus();
  }
}

/** Marks where two answers part ways; returns the number of the token, from 1, or 0 where they are the same. */
export function compare(left, right) {
  for (const token of [...left.tokens, ...right.tokens]) token.classList.remove("first-difference");
  const texts = [left, right].map((answer) => answer.entries.map(({ token }) => token));
  const longest = Math.max(texts[0].length, texts[1].length);
  for (let i = 0; i < longest; i += 1) {
    if (texts[0][i] === texts[1][i]) continue;
    for (const answer of [left, right]) answer.tokens[i]?.classList.add("first-difference");
    return i + 1;
  }
  return 0;
}
