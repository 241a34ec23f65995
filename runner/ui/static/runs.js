// Runs: all of them, those of other shells too, with filters.
import { ACTIVE, ask, duration, html, known, number, useEffect, useState, when } from "./lib.js";
import { Problems, State } from "./parts.js";

const EVERY_MS = 2000;

export function Runs() {
  const [rows, setRows] = useState(null);
  const [failed, setFailed] = useState(null);
  const [word, setWord] = useState("");
  const [state, setState] = useState("");
  const [chosen, setChosen] = useState([]);
  useEffect(() => {
    let timer = 0, over = false;
    const look = async () => {
      try { setRows(await ask("/api/runs")); setFailed(null); } catch (error) { setFailed(error.problems); }
      if (!over) timer = setTimeout(look, EVERY_MS);
    };
    look();
    return () => { over = true; clearTimeout(timer); };
  }, []);
  if (!rows) return html`<${Problems} problems=${failed} /><p class="empty">Reading the runs …</p>`;
  const words = word.toLowerCase().split(/\s+/);
  const shown = rows.filter((r) => (state === "" || (state === "running" ? ACTIVE.includes(r.state) : r.state === state)) && words.every((w) => `${r.run_id} ${r.model} ${r.method} ${r.objective} ${r.data}`.toLowerCase().includes(w)));
  return html`<div class="head"><div><h1>Runs</h1><p class="sub">${rows.length} here, those of other shells among them.</p></div>
      <button type="button" id="compare" disabled=${chosen.length < 2} onClick=${() => { location.hash = `#/compare/${chosen.map(encodeURIComponent).join("/")}`; }}>${chosen.length < 2 ? "Select runs to compare" : `Compare ${chosen.length} runs`}</button></div>
    <${Problems} problems=${failed} />
    <section class="card"><div class="row"><input class="grow" type="search" aria-label="Filter runs" placeholder="Filter by name, model, method, data" value=${word} onInput=${(e) => setWord(e.target.value)} />
      <select aria-label="State" class="grow" value=${state} onChange=${(e) => setState(e.target.value)}><option value="">every state</option>${["running", "done", "interrupted", "failed", "killed"].map((s) => html`<option>${s}</option>`)}</select></div>
    ${shown.length ? html`<div class="scroll"><table class="cards"><thead><tr><th><span class="soft">Select</span></th><th>Run</th><th>State</th><th>Model</th><th>Method</th><th>Data</th><th class="right">Step</th><th class="right">Loss</th><th class="right">Exact</th><th class="right">Time</th><th>Started</th></tr></thead>
      <tbody>${shown.map((r) => html`<tr key=${r.run_id}><td data-label="Select"><input type="checkbox" aria-label=${`Select ${r.run_id}`} checked=${chosen.includes(r.run_id)} onChange=${(e) => setChosen(e.target.checked ? [...chosen, r.run_id] : chosen.filter((c) => c !== r.run_id))} /></td><td data-label="Run"><a href=${`#/run/${encodeURIComponent(r.run_id)}`}>${r.run_id}</a></td><td data-label="State"><${State} state=${r.state} /></td><td data-label="Model">${r.model || "–"}</td><td data-label="Method">${r.method || "–"}</td><td data-label="Data">${r.data || "–"}</td>
        <td class="right" data-label="Step">${r.step || "–"}${r.num_steps ? ` / ${r.num_steps}` : ""}</td><td class="right" data-label="Loss">${number(r.loss)}</td><td class="right" data-label="Exact">${known(r.exact_match) ? `${Math.round(100 * r.exact_match)}%` : "–"}</td><td class="right" data-label="Time">${duration(r.seconds)}</td><td data-label="Started">${when(r.created)}</td></tr>`)}</tbody></table></div>`
      : html`<p class="empty">${rows.length ? "No run fits this filter." : html`No runs yet. <a href="#/compose">Compose one</a>`}</p>`}</section>`;
}
