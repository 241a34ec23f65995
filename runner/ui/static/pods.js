// Pods: what is rented, what it has cost, when it ends; and its end.
import { ask, duration, html, known, money, number, Refused, useEffect, useState, when } from "./lib.js";
import { Ask, Problems } from "./parts.js";

const EVERY_MS = 5000;

export function Pods() {
  const [found, setFound] = useState(null);
  const [failed, setFailed] = useState(null);
  const [ending, setEnding] = useState(null);
  const [busy, setBusy] = useState(null);
  const [prices, setPrices] = useState([]);
  const look = async () => { try { setFound(await ask("/api/pods")); setFailed(null); } catch (error) { setFailed(error.problems); } };
  useEffect(() => {
    look();
    ask("/api/catalogue").then((c) => setPrices(c.groups.hw.filter((row) => row.usd_per_hour))).catch(() => {});
    const timer = setInterval(look, EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  const terminate = async (pod) => {
    setEnding(null);
    setBusy(pod);
    try { await ask(`/api/pods/${encodeURIComponent(pod)}/terminate`, { confirmed: pod }); await look(); } catch (error) { if (!(error instanceof Refused)) throw error; setFailed(error.problems); }
    setBusy(null);
  };
  const rows = found ? found.pods : [];
  return html`<div class="head"><div><h1>Pods</h1><p class="sub">Rented machines of this project. Each ends itself at its deadline.</p></div></div>
    <${Problems} problems=${failed} />
    ${found && !found.account ? html`<section class="card"><h2>No account</h2>${found.problems.map((p) => html`<p>${p.what}</p><p class="soft">${p.remedy}</p>`)}<p class="soft">To try it without one, <code>python -m runner emulate</code> prints two variables: export them, then start the page again.</p></section>` : null}
    ${found && found.account ? html`<section class="card">${rows.length ? html`<div class="scroll"><table class="cards" id="pods"><thead><tr><th>Pod</th><th>Run</th><th>State</th><th>GPU</th><th class="right">An hour</th><th class="right">So far</th><th class="right">Age</th><th>Deadline</th><th><span class="soft">End it</span></th></tr></thead>
      <tbody>${rows.map((r) => html`<tr key=${r.pod_id || r.name}><td data-label="Pod">${r.pod_id || r.name}</td><td data-label="Run">${r.run_id ? html`<a href=${`#/run/${encodeURIComponent(r.run_id)}`}>${r.run_id}</a>` : "–"}</td><td data-label="State"><span class="pill">${r.state.toLowerCase()}</span></td><td data-label="GPU">${r.gpu || "–"}</td>
        <td class="right" data-label="An hour">${money(r.usd_per_hour)}</td><td class="right" data-label="So far">${money(r.usd)}</td><td class="right" data-label="Age">${duration(r.age_hours * 3600)}</td><td data-label="Deadline">${when(r.deadline)}</td>
        <td class="right">${r.pod_id ? html`<button type="button" class="danger" disabled=${busy === r.pod_id} aria-label=${`Terminate ${r.pod_id}`} onClick=${() => setEnding(r)}>${busy === r.pod_id ? "Ending …" : "Terminate"}</button>` : null}</td></tr>`)}</tbody></table></div>` : html`<p class="empty">Nothing is rented.</p>`}</section>` : null}
    ${prices.length ? html`<section class="card"><h2>Prices of the catalogue</h2><div class="scroll"><table class="cards"><thead><tr><th>hw</th><th>GPU</th><th class="right">GiB</th><th class="right">An hour</th><th>Seen</th></tr></thead><tbody>${prices.map((row) => html`<tr key=${row.name}><td data-label="hw">${row.name}</td><td data-label="GPU">${row.num_gpus} × ${row.gpu}</td><td class="right" data-label="GiB">${number(row.memory_gib, 3)}</td><td class="right" data-label="An hour">${money(row.usd_per_hour * row.num_gpus)}</td><td data-label="Seen" class="soft small">${known(row.price_date) ? String(row.price_date) : "–"}</td></tr>`)}</tbody></table></div></section>` : null}
    ${ending ? html`<${Ask} title=${`Terminate ${ending.pod_id}?`} danger yes="Terminate it" onYes=${() => terminate(ending.pod_id)} onNo=${() => setEnding(null)}><p>Data that is only on its disk is lost. It has cost ${money(ending.usd)} so far.</p><//>` : null}`;
}
