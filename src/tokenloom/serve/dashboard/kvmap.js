// The KV pool as a map: a square per block, or per few of them.

const COLORS = { r: "--decode", c: "--cached", t: "--training", f: "--free" };
const LARGEST = 18;
let last = null;

/** Draws the pool's letters into a canvas. */
export function drawMap(canvas, letters) {
  last = [canvas, letters];
  const scale = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  // Whole pixels of the screen, or the squares would blur.
  let cell = Math.min(LARGEST * scale, Math.floor(Math.sqrt((canvas.width * canvas.height) / letters.length)));
  while (cell > 1 && Math.ceil(letters.length / Math.floor(canvas.width / cell)) * cell > canvas.height) cell -= 1;
  const columns = Math.floor(canvas.width / cell);
  const gap = cell >= 4 ? Math.max(1, Math.round(cell / 8)) : 0;
  const style = getComputedStyle(document.documentElement);
  for (const [letter, name] of Object.entries(COLORS)) {
    pen.fillStyle = style.getPropertyValue(name).trim();
    for (let i = letters.indexOf(letter); i >= 0; i = letters.indexOf(letter, i + 1)) {
      pen.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - gap, cell - gap);
    }
  }
}

const again = () => last && drawMap(...last);
document.addEventListener("themechange", again);
addEventListener("resize", again);
