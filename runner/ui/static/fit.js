// Fit: the hardware, or hardware and method, on which the composed run fits; picking a row fills the form.
import { ask, duration, html, known, money, number, Refused, useState } from "./lib.js";
import { Problems } from "./parts.js";

const MOST = 15;

export function Fit({ asked, onPick }) {
  const [found, setFound] = useState(null);
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState(null);
  const search = async (open) => {
    setBusy(true);
    setFailed(null);
    try {
      setFound(await ask("/api/fit", { ...asked, open }));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      setFailed(error.problems);
    }
    setBusy(false);
  };
  const rows = found ? found.rows.filter((row) => row.fits).slice(0, MOST) : [];
  return html`<section class="card" aria-label="Fit"><div class="row"><h2 class="grow">What fits</h2>
      <button type="button" disabled=${busy} onClick=${() => search(["hw"])}>Find hardware</button>
      <button type="button" disabled=${busy} onClick=${() => search(["hw", "method"])}>Hardware and method</button></div>
    <${Problems} problems=${failed} />
    ${busy ? html`<p class="soft" role="status">Planning every machine of the catalogue …</p>` : found ? html`<p class="soft small" role="status">${found.title}${rows.length ? "" : ". Nothing of the catalogue holds it."}</p>` : html`<p class="soft small">Plans every machine of the catalogue, the cheapest first.</p>`}
    ${rows.length ? html`<div class="scroll"><table class="cards"><thead><tr><th>Hardware</th><th>Method</th><th>ZeRO</th><th class="right">GiB</th><th class="right">Time</th><th class="right">Cost</th><th><span class="soft">Take it</span></th></tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${`${row.hw} ${row.method}`}><td data-label="Hardware">${row.hw}</td><td data-label="Method">${row.method}</td><td data-label="ZeRO">${row.zero_stage}</td>
        <td class="right" data-label="GiB">${number(row.peak_gib, 3)} of ${number(row.capacity_gib, 3)}</td><td class="right" data-label="Time">${known(row.hours) ? duration(row.hours * 3600) : "–"}</td><td class="right" data-label="Cost">${money(row.usd)}</td>
        <td class="right"><button type="button" aria-label=${`Use ${row.hw} with ${row.method}`} onClick=${() => onPick({ hw: row.hw, method: row.method })}>Use</button></td></tr>`)}</tbody></table></div>` : null}</section>`;
}
