// uPlot in the page's colours. Colours are read when a chart is drawn, so that it follows the theme.

import uPlot from "./vendor/uPlot.esm.js";

const charts = new Set();
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

document.addEventListener("themechange", () => {
  for (const chart of charts) chart.redraw(false, true);
});

function axis(more) {
  return {
    stroke: () => css("--muted"),
    grid: { stroke: () => css("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    ...more,
  };
}

/** A chart that fills `element`, whatever its size. */
function draw(element, options, data) {
  const size = () => ({ width: Math.max(120, element.clientWidth), height: Math.max(80, element.clientHeight) });
  const chart = new uPlot({ ...size(), legend: { show: false }, padding: [8, 32, 0, 0], ...options }, data, element);
  charts.add(chart);
  new ResizeObserver(() => {
    if (element.clientWidth > 0) chart.setSize(size());
  }).observe(element);
  return chart;
}

const timeAxis = () =>
  axis({
    space: 70,
    size: 28,
    values: (u, ticks) => ticks.map((at) => new Date(at * 1000).toLocaleTimeString("en-GB")),
  });

/**
 * Areas on top of one another over time. `series` are `{name, color}` (a CSS variable), from the bottom up.
 * Returns `set(times, rows)`, rows being a list per series, and `point(index or null)`, which puts the pointer's line
 * there; `onHover(index or null)` follows the pointer.
 */
export function stacked(element, series, onHover) {
  const chart = draw(
    element,
    {
      cursor: { y: false, points: { show: false } },
      scales: { x: { time: true }, y: { range: (u, low, high) => [0, Math.max(10, high * 1.08)] } },
      axes: [timeAxis(), axis({ size: 46 })],
      series: [
        {},
        ...series.map(({ color }) => ({
          stroke: () => css(color),
          fill: () => css(color) + "cc",
          width: 1,
          points: { show: false },
        })),
      ],
      bands: series.slice(1).map((_, i) => ({ series: [i + 2, i + 1] })).reverse(),
      hooks: { setCursor: [(u) => onHover(u.cursor.idx ?? null)] },
    },
    [[], ...series.map(() => [])],
  );
  function set(times, rows) {
    let below = times.map(() => 0);
    const sums = rows.map((row) => (below = row.map((value, i) => value + below[i])));
    chart.setData([times, ...sums]);
  }
  function point(index) {
    chart.setCursor({ left: index === null ? -1 : chart.valToPos(chart.data[0][index], "x"), top: 0 }, false);
    onHover(index);
  }
  return { set, point };
}

/**
 * Lines over time or steps. `series` are `{color, dash, points}`; gaps are nulls. `x` is "time" or "step".
 * Returns `set(xs, ys)`.
 */
export function lines(element, series, { x = "time" } = {}) {
  const chart = draw(
    element,
    {
      cursor: { y: false, points: { size: 6 } },
      scales: {
        x: { time: x === "time" },
        y: { range: (u, low, high) => (low === null ? [0, 1] : [Math.min(0, low), high * 1.1 || 1]) },
      },
      axes: [
        x === "time" ? timeAxis() : axis({ size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000] }),
        axis({ size: 46, space: 30 }),
      ],
      series: [
        {},
        ...series.map(({ color, dash, points }) => ({
          stroke: () => css(color),
          width: dash ? 1.5 : 2,
          dash,
          spanGaps: true,
          // A line through one or two points alone would not be seen.
          points: { show: (u) => Boolean(points) || u.data[0].length < 3, size: 5, fill: () => css(color) },
        })),
      ],
    },
    [[], ...series.map(() => [])],
  );
  return (xs, ys) => chart.setData([xs, ...ys]);
}
