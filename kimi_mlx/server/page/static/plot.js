// A small plot of tokens per second over the last minutes.

import { element, svg } from "./dom.js";
import { decimal, text } from "./i18n.js";

const MIN_LENGTH = 12; // values that the plot has room for at least
const WIDTH = 600;
const HEIGHT = 120;

// Return a figure. `series` are of generated and of read tokens, each {name, label, values} with the newest value last.
export function plot(series, intervalSeconds) {
  const length = Math.max(MIN_LENGTH, ...series.map(({ values }) => values.length));
  const highest = Math.max(1, ...series.flatMap(({ values }) => values));
  const lines = series.map(({ name, values }) => {
    const first = length - values.length;
    const points = values.map((value, index) => {
      const x = ((first + index) / (length - 1)) * WIDTH;
      return `${x.toFixed(1)},${(HEIGHT - (value / highest) * (HEIGHT - 4) - 2).toFixed(1)}`;
    });
    return svg("polyline", { class: name, points: points.join(" "), fill: "none" });
  });
  const [generated, read] = series.map(({ values }) => decimal(values.at(-1) ?? 0));
  const label = text("plot", { generated, read, highest: decimal(highest) });
  const minutes = Math.max(1, Math.round((length * intervalSeconds) / 60));
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, preserveAspectRatio: "none" },
    svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }),
    ...lines,
  );
  const scale = element("p", { class: "scale", "aria-hidden": "true" }, text("tokPerS", { rate: decimal(highest) }));
  const legend = series.map(({ name, label }) => element("span", { class: `key ${name}` }, label));
  return element("figure", { class: "plot" }, scale, picture, element("figcaption", {}, ...legend, ` ${text("lastMinutes", { minutes })}`));
}
