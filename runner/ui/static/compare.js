// Runs beside each other: curves over steps, the keys that differ, and how each came out, the best first.
import { Chart } from "./chart.js";
import { ask, count, duration, html, known, money, number, useEffect, useState } from "./lib.js";
import { Problems, State } from "./parts.js";

const COLUMNS = [["metric", "Metric", number], ["steps", "Steps", count], ["loss_last", "Loss", number], ["held_out_loss_after", "Held-out loss", number], ["exact_match_after", "Exact", (v) => (known(v) ? `${Math.round(100 * v)}%` : "–")], ["tokens_per_second", "Tokens/s", count], ["peak_memory_gib", "Peak GiB", (v) => number(v, 3)], ["seconds", "Time", duration], ["usd", "Cost", money]];

export function Compare({ ids }) {
  const [found, setFound] = useState(null);
  const [failed, setFailed] = useState(null);
  useEffect(() => { ask("/api/compare", { runs: ids }).then(setFound).catch((e) => setFailed(e.problems)); }, []);
  if (failed) return html`<${Problems} problems=${failed} /><p><a href="#/runs">All runs</a></p>`;
  if (!found) return html`<p class="empty">Comparing …</p>`;
  const names = Object.keys(found.curves);
  const steps = [...new Set(names.flatMap((name) => found.curves[name].step))].sort((a, b) => a - b);
  const losses = names.map((name) => { const at = new Map(found.curves[name].step.map((s, i) => [s, found.curves[name].loss[i]])); return steps.map((s) => at.get(s) ?? null); });
  const runs = found.results, shown = COLUMNS.filter(([key]) => runs.some((r) => known(r[key])));
  const differing = Object.entries(found.differences);
  return html`<div class="head"><div><h1>Comparison</h1><p class="sub">Sorted by ${found.metric}, ${found.mode === "max" ? "the highest" : "the lowest"} first.${found.notes.map((note) => ` ${note[0].toUpperCase()}${note.slice(1)}.`)}</p></div></div>
    <section class="card"><h2>Results</h2><div class="scroll"><table class="cards"><thead><tr><th>Run</th><th>State</th>${shown.map(([key, title]) => html`<th class="right">${title}</th>`)}</tr></thead>
      <tbody>${runs.map((r) => html`<tr><td data-label="Run"><a href=${`#/run/${encodeURIComponent(r.run_id)}`}>${r.run_id}</a></td><td data-label="State"><${State} state=${r.state} /></td>${shown.map(([key, title, form]) => html`<td class="right" data-label=${title}>${form(r[key])}</td>`)}</tr>`)}</tbody></table></div></section>
    ${steps.length ? html`<${Chart} title="Loss" names=${names} columns=${[steps, ...losses]} height=${240} tall />` : null}
    <section class="card"><h2>What differs</h2>${differing.length ? html`<div class="scroll" tabindex="0" role="region" aria-label="What differs"><table><thead><tr><th>Key</th>${runs.map((r) => html`<th>${r.run_id}</th>`)}</tr></thead>
      <tbody>${differing.map(([key, values]) => html`<tr><td class="mono">${key}</td>${values.map((v) => html`<td class="mono">${v === null ? "null" : typeof v === "object" ? JSON.stringify(v) : String(v)}</td>`)}</tr>`)}</tbody></table></div>` : html`<p class="soft">Their configurations are the same.</p>`}</section>`;
}
