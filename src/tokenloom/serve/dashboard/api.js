// Requests to the server: with the key, errors in its own words, and server-sent events.

const STORED = "tokenloom-key";
let askForKey = async () => {};

/** `ask(problem)` is awaited when the server refuses the key; it stores a new one by `setKey`. */
export function onUnauthorized(ask) {
  askForKey = ask;
}

export function setKey(key) {
  sessionStorage.setItem(STORED, key);
}

function headers(more = {}) {
  const key = sessionStorage.getItem(STORED);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** An answer that the server refused; the message is the server's. */
export class ApiError extends Error {
  constructor(message, status, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

async function failure(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, error.param);
  } catch {
    return new ApiError(`the server answered ${response.status}`, response.status, null);
  }
}

/** The response, once it is one of success; asks for a key as often as the server refuses it. */
export async function send(path, options = {}) {
  for (;;) {
    const sent = sessionStorage.getItem(STORED);
    const response = await fetch(path, { ...options, headers: headers(options.headers) });
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401) throw error;
    await askForKey(sent ? error.message : "", sent);
  }
}

export const get = async (path) => (await send(path)).json();

export async function post(path, body) {
  const options = { method: "POST" };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  return (await send(path, options)).json();
}

/** The data of a response's events. EventSource can send no key, so that they are read here. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length) yield data.map((line) => line.slice(6)).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
