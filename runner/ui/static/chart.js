// A chart that follows its columns: uPlot, in the page's colours, drawn again at most once a frame.
import { html, useEffect, useRef } from "./lib.js";

const SERIES = { light: ["#0f6b5f", "#c2571a", "#3b5bdb", "#9c36b5", "#866b00", "#c2255c"], dark: ["#5cc9b6", "#f2a269", "#91a7ff", "#da8ff0", "#e0c252", "#faa2c1"] };
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function Chart({ title, names, columns, height = 180, tall, log }) {
  const box = useRef(null), plot = useRef(null), frame = useRef(0);
  useEffect(() => {
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const palette = SERIES[dark() ? "dark" : "light"];
    const figure = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : Number(value).toPrecision(4));
    plot.current = new window.uPlot({
      width: box.current.clientWidth || 300, height, legend: { live: true }, cursor: { drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
      axes: [axis, { ...axis, size: 62, values: (_, ticks) => ticks.map((t) => (t === null ? "" : Math.abs(t) >= 1e4 || (t !== 0 && Math.abs(t) < 1e-3) ? t.toExponential(0) : String(Number(t.toPrecision(4))))) }],
      series: [{ label: "step" }, ...names.map((name, i) => ({ label: name, stroke: palette[i % palette.length], width: 1.6, spanGaps: true, points: { show: i > 0 && names[i] === "held out", size: 6 }, value: (_, v) => figure(v) }))],
    }, columns, box.current);
    const resized = new ResizeObserver(() => plot.current.setSize({ width: box.current.clientWidth, height }));
    resized.observe(box.current);
    return () => { resized.disconnect(); cancelAnimationFrame(frame.current); plot.current.destroy(); };
  }, [names.join("\n"), log]);
  useEffect(() => {
    cancelAnimationFrame(frame.current);
    frame.current = requestAnimationFrame(() => plot.current && plot.current.setData(columns));
  }, [columns]);
  const last = names.length === 1 ? columns[1].filter((v) => v !== null).at(-1) : undefined;
  return html`<section class="card" aria-label=${title}><h2>${title}</h2><div class=${tall ? "chart tall" : "chart"} role="img" aria-label=${`${title} over steps${last === undefined ? "" : `, now ${last}`}`} ref=${box} /></section>`;
}
