// Elements, and numbers as people read them.

export const byId = (id) => document.getElementById(id);

/** An element; `props` are its properties, or attributes where their names have a dash or are `role` or `for`. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "for" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Sets an element's text, and leaves it alone where that is its text already. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Greys a button out. Not by `disabled`, which would take the focus from whoever has just pressed it. */
export const turnOff = (button, off) => button.setAttribute("aria-disabled", String(off));

/** Puts new children into the place of those that differ; whoever reads or points at another is not disturbed. */
export function patch(box, children) {
  const old = [...box.children];
  children.forEach((child, i) => {
    if (!old[i]) box.append(child);
    else if (old[i].isEqualNode(child)) return;
    else if (child.localName === "tr") patch(old[i], [...child.cells]);
    else old[i].replaceWith(child);
  });
  for (const rest of old.slice(children.length)) rest.remove();
}

const CALM_MS = 3000;
const described = new WeakMap(); // what is to be told of an element, and of what

/**
 * Says in words what a picture shows, at a rate at which one can listen: a text that comes sooner waits. That of
 * another `what` waits for nothing.
 */
export function describe(element, text, what = "") {
  const waiting = described.get(element);
  described.set(element, { text, what });
  if (waiting?.what === what) return;
  element.setAttribute("aria-label", text);
  if (waiting) return;
  setTimeout(() => {
    const newest = described.get(element);
    described.delete(element);
    if (newest.text !== element.getAttribute("aria-label")) describe(element, newest.text, newest.what);
  }, CALM_MS);
}

const MOST_SAID = 5;

/** Tells whoever listens to the page, without an interruption, what others see happen. */
export function announce(text) {
  const box = byId("said");
  box.append(h("p", { textContent: text }));
  if (box.children.length > MOST_SAID) box.firstChild.remove();
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** 1,234 or 12.3K. */
export const count = (number) => (Math.abs(number) < 10000 ? whole.format(number) : short.format(number));

/** 0.8, 12, 1,234: a rate. */
export const rate = (number) => (number > 0 && number < 9.95 ? number.toFixed(1) : count(number));

export const percent = (share) => `${(share * 100).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;

/** Milliseconds as "12 ms" or "1.4 s"; "–" for none. */
export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value < 9.95) return `${value.toFixed(1)} ms`;
  return value < 1000 ? `${Math.round(value)} ms` : seconds(value / 1000);
}

/** Seconds as "1.4 s", "3 min" or "2 h 5 min". */
export function seconds(value) {
  if (value < 59.95) return `${value.toFixed(value < 9.95 ? 1 : 0)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value.toFixed(value < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

/** Unix seconds as the time of day, here. */
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");
