// The live feed: one snapshot a second, taken up again when it breaks off.

import { ApiError, events, send } from "./api.js";

const AGAIN_MS = 2000;
const SILENT_MS = 10000;

/**
 * Keeps a feed open while the page is seen.
 *
 * `onSnapshot(snapshot)` gets each one; `onState(state)` gets "live", "lost" or "draining".
 */
export function follow(onSnapshot, onState) {
  let stop = null;

  async function open() {
    const here = new AbortController();
    stop = here;
    while (!here.signal.aborted) {
      try {
        await once(here.signal);
      } catch (error) {
        if (here.signal.aborted) return;
        if (!(error instanceof ApiError || error instanceof TypeError || error.name === "AbortError")) console.error(error);
      }
      if (here.signal.aborted) return;
      onState("lost");
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }

  async function once(outer) {
    const inner = new AbortController();
    const signal = AbortSignal.any([outer, inner.signal]);
    let silence = setTimeout(() => {}, 0);
    try {
      for await (const data of events(await send("/live", { signal }))) {
        clearTimeout(silence);
        // A connection that is half open says nothing of it.
        silence = setTimeout(() => inner.abort(), SILENT_MS);
        const snapshot = JSON.parse(data);
        onState(snapshot.status === "ready" ? "live" : "draining");
        onSnapshot(snapshot);
      }
    } finally {
      clearTimeout(silence);
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stop?.abort();
    else if (stop?.signal.aborted) open();
  });
  open();
}
