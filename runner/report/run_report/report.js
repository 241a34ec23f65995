// Curves, filters and folds of a run report. Every text from the data is put in as text.
(() => {
  "use strict";
  const root = document.documentElement;
  const failed = (event) => { root.dataset.failed = String(event.message || event.violatedDirective); };
  addEventListener("error", failed);
  document.addEventListener("securitypolicyviolation", failed);

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // Apart from one another for all kinds of colour vision (Okabe and Ito), and readable on light and dark.
  const COLOURS = ["#2f7fd1", "#d98200", "#1a9e77", "#c2559b", "#7a6fd0", "#8c8c3a", "#c8553d", "#4aa3b8"];
  const STEADY = new Set(["learning_rate", "memory_gib"]);
  const several = data.runs.length > 1;
  const place = byId("charts");
  const last = Math.max(1, ...data.runs.flatMap((run) => Object.values(run.train).map(([x]) => x[x.length - 1] || 1)));
  let plots = [];

  const format = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  // Steps over which the running mean forgets; the slider goes from none to a fifth of the run.
  const memory = () => {
    const share = Number(byId("smoothing").value) / 100;
    const steps = share ** 2 * last * 0.2;
    return steps < 0.5 ? 0 : steps;
  };

  // Exponential running mean, corrected for its start; steps that are further apart weigh more.
  const smooth = ([xs, ys], over) => {
    let total = 0, weight = 0, before = null;
    const means = ys.map((y, i) => {
      if (y === null) return null;
      const kept = before === null ? 0 : Math.exp(-(xs[i] - before) / over);
      before = xs[i];
      total = kept * total + (1 - kept || 1) * y;
      weight = kept * weight + (1 - kept || 1);
      return total / weight;
    });
    return [xs, means];
  };

  const positive = ([xs, ys], log) => log ? [xs, ys.map((y) => (y !== null && y > 0 ? y : null))] : [xs, ys];

  const linesOf = (key, over, log) => {
    const lines = [];
    data.runs.forEach((run, index) => {
      const hue = several ? COLOURS[index % COLOURS.length] : colour("--accent");
      const dash = index >= COLOURS.length ? [6, 4] : undefined;
      const raw = run.train[key];
      if (raw && raw[0].length) {
        const smoothed = over > 0 && !STEADY.has(key) && raw[0].length > 2;
        if (smoothed && !several) lines.push({ label: "each step", stroke: colour("--faint"), width: 1, curve: raw });
        const curve = smoothed ? smooth(raw, over) : raw;
        lines.push({ label: several ? run.label : smoothed ? "smoothed" : "value", stroke: hue, width: 2, dash, curve });
      }
      const held = run.held[key];
      if (held && held[0].length) {
        const dots = { show: true, size: 7, fill: several ? hue : colour("--ink"), stroke: several ? hue : colour("--ink") };
        const stroke = several ? hue : colour("--ink");
        lines.push({ label: several ? run.label + ", held out" : "held out", stroke, width: 1.5, dash: [3, 4], points: dots, curve: held });
      }
    });
    return lines.map((line) => ({ ...line, curve: positive(line.curve, log) }));
  };

  const draw = (chart) => {
    const box = document.createElement("div");
    box.className = "chart";
    const title = document.createElement("h3");
    title.textContent = chart.title + " ";
    const unit = document.createElement("span");
    unit.textContent = chart.unit;
    title.append(unit);
    box.append(title);
    const log = byId("log").checked;
    const lines = linesOf(chart.key, memory(), log);
    if (!lines.length || !lines.some((line) => line.curve[1].some((y) => y !== null))) return;
    place.append(box);
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const tall = place.firstElementChild === box ? 270 : 190;
    const legend = data.runs.length <= 4 || (place.firstElementChild === box && data.runs.length <= 8);
    const one = lines.every((line) => line.curve[0].length === 1);
    const plot = new uPlot({
      width: Math.max(220, box.clientWidth - 16), height: tall, padding: [10, 28, 0, 0],
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 7 } },
      legend: { show: legend, live: true, markers: { width: 0, fill: (u, i) => u.series[i].hue } },
      scales: { x: { time: false, ...(one ? { range: (_, low, high) => [low - 1, high + 1] } : {}) }, y: { distr: log ? 3 : 1 } },
      axes: [
        { ...axis, size: 32, values: (_, at) => at.map((x) => (Number.isInteger(x) ? x.toLocaleString("en") : "")) },
        { ...axis, size: 66, values: (_, at) => at.map((y) => (y === null ? "" : format(y))) },
      ],
      series: [
        { label: "step", value: (_, x) => (x == null ? "–" : x.toLocaleString("en")) },
        ...lines.map(({ curve, ...line }) => ({
          ...line, hue: line.stroke, value: (_, y) => format(y), spanGaps: false,
          points: line.points || { show: curve[0].length < 3, size: 6 },
        })),
      ],
    }, uPlot.join(lines.map((line) => line.curve)), box);
    plots.push({ plot, box });
  };

  const redraw = () => {
    if (!place) return;
    const seen = plots[0] && plots[0].plot.scales.x;
    const zoom = seen && zoomed ? { min: seen.min, max: seen.max } : null;
    plots.forEach(({ plot }) => plot.destroy());
    plots = [];
    place.replaceChildren();
    const over = memory();
    byId("smoothed").textContent = over ? `${Math.round(over).toLocaleString("en")} step${over < 1.5 ? "" : "s"}` : "none";
    data.charts.forEach(draw);
    if (zoom) plots.forEach(({ plot }) => plot.setScale("x", zoom));
    root.dataset.charts = String(plots.length);
  };

  let zoomed = false;
  if (place) {
    let waiting = 0;
    const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); };
    byId("smoothing").addEventListener("input", soon);
    byId("log").addEventListener("change", soon);
    byId("reset").addEventListener("click", () => { zoomed = false; redraw(); });
    place.addEventListener("mouseup", () => { zoomed = true; });
    place.addEventListener("dblclick", () => { zoomed = false; });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
    addEventListener("resize", () => plots.forEach(({ plot, box }) => plot.setSize({ width: Math.max(220, box.clientWidth - 16), height: plot.height })));
    addEventListener("beforeprint", () => { root.dataset.print = ""; redraw(); });
    addEventListener("afterprint", () => { delete root.dataset.print; redraw(); });
    redraw();
  }

  // The colours of the runs, in the table of results.
  document.querySelectorAll(".swatch").forEach((one, index) => {
    if (index < data.runs.length) one.style.background = COLOURS[index % COLOURS.length];
  });

  const which = byId("which");
  if (which) which.addEventListener("change", () => {
    const all = [...document.querySelectorAll("#answers article")];
    all.forEach((one) => { one.hidden = which.value !== "all" && !one.dataset.became.split(" ").includes(which.value); });
    const count = all.filter((one) => !one.hidden).length;
    byId("counted").textContent = `${count} prompt${count === 1 ? "" : "s"}`;
  });

  const chosen = byId("chosen");
  if (chosen) chosen.addEventListener("change", () => {
    document.querySelectorAll(".yaml > div").forEach((line) => { line.hidden = chosen.checked && !line.classList.contains("chosen"); });
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
