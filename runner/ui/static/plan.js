// The plan of what is composed: memory by phase, time, cost, problems; and what starts it.
import { ask, count, duration, html, known, money, number, Refused, useState } from "./lib.js";
import { Ask, Copy, Problems } from "./parts.js";

export function Plan({ found, busy, asked, colours, failed, onFix }) {
  const [question, setQuestion] = useState(null);
  const [launch, setLaunch] = useState(null);
  const problems = [...(failed || []), ...found.problems];
  const plan = found.plan;
  const start = async (usd) => {
    setQuestion(null);
    setLaunch({ output: "", waiting: true });
    try {
      const { launch: id } = await ask("/api/runs", { ...asked, usd_per_hour: usd });
      await followLaunch(id, setLaunch);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      setLaunch({ problems: error.problems });
    }
  };
  const begin = () => (found.rents ? setQuestion(true) : start(null));
  const download = async () => {
    const { yaml } = await ask("/api/recipe", asked);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([yaml], { type: "text/yaml" }));
    link.download = `${asked.recipe || "my"}-recipe.yaml`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return html`<section class="card" aria-busy=${busy}>
    <h2>Plan</h2>
    ${plan ? html`<${Facts} plan=${plan} colours=${colours} />` : problems.length ? null : html`<p class="soft">Working it out …</p>`}
    <${Problems} problems=${problems} onFix=${onFix} />
    <div class="row"><button type="button" class="main" id="start" disabled=${problems.length > 0 || busy || !plan || (launch && launch.waiting)} onClick=${begin}>${found.rents ? "Rent and start" : "Start the run"}</button>
      <button type="button" disabled=${!plan} onClick=${download}>Download recipe</button></div>
    ${launch ? html`<${Launch} launch=${launch} />` : null}
  </section>
  ${found.command ? html`<section class="card"><div class="row"><h2 class="grow">The same in a shell</h2><${Copy} text=${found.command} /></div><pre id="command">${found.command}</pre></section>` : null}
  ${question ? html`<${Ask} title="Rent this machine?" yes=${`Rent at ${money(plan.usd_per_hour)} an hour`} onYes=${() => start(plan.usd_per_hour)} onNo=${() => setQuestion(null)}>
    <p>${plan.title}: ${money(plan.usd_per_hour)} an hour${known(plan.usd) ? `, about ${money(plan.usd)} for ${duration(plan.hours * 3600)}` : ""}.</p>
    <p class="soft small">${plan.price_source || "The price is that of the catalogue."}</p><//>` : null}`;
}

export async function followLaunch(id, tell) {
  for (;;) {
    const state = await ask(`/api/launches/${id}`);
    if (state.run_id) { location.hash = `#/run/${encodeURIComponent(state.run_id)}`; return; }
    tell({ ...state, waiting: state.running });
    if (!state.running) return;
    await new Promise((resolve) => { setTimeout(resolve, 300); });
  }
}

export const Launch = ({ launch }) => html`<div role="status">${launch.problems ? html`<${Problems} problems=${launch.problems} />`
  : html`<p class="soft small">${launch.waiting ? "Starting: checks and the plan come first …" : "It was not started:"}</p>${launch.output ? html`<pre tabindex="0">${launch.output}</pre>` : null}`}</div>`;

function Facts({ plan, colours }) {
  const scale = Math.max(plan.capacity_gib || 0, ...plan.bars.map((bar) => bar.parts.reduce((sum, part) => sum + part.gib, 0)));
  const used = [...new Set(plan.bars.flatMap((bar) => bar.parts.map((part) => part.family)))];
  return html`<p><strong>${plan.title}</strong></p>
    <p id="verdict" class=${plan.fits ? "good" : "bad"}>${plan.fits ? "Fits" : "Does not fit"}: ${number(plan.peak_gib.expected, 3)} ${known(plan.capacity_gib) ? `of ${number(plan.capacity_gib, 3)} ` : ""}GiB at the peak</p>
    <div class="bars">${plan.bars.map((bar) => html`<${Bar} key=${bar.phase} bar=${bar} scale=${scale} capacity=${plan.capacity_gib} peak=${bar.phase === plan.peak_phase} colours=${colours} />`)}</div>
    <div class="legend">${used.map((name) => html`<span><i style=${{ background: colours[name] }} />${name}</span>`)}</div>
    <dl class="facts">
      <dt>Time</dt><dd>${known(plan.hours) ? duration(plan.hours * 3600) : "not known"}</dd>
      <dt>Cost</dt><dd>${known(plan.usd) ? `${money(plan.usd)} at ${money(plan.usd_per_hour)}/h` : "–"}</dd>
      <dt>Steps</dt><dd>${known(plan.num_steps) ? `${count(plan.num_steps)} of ${plan.batch} × ${count(plan.max_length)} tokens` : "not known"}</dd>
      <dt>Speed</dt><dd>${known(plan.tokens_per_second) ? `${count(plan.tokens_per_second)} tokens/s` : "not known"}</dd>
      <dt>ZeRO</dt><dd>${plan.zero_stage}</dd><dt>Trains</dt><dd>${count(plan.trainable_parameters)} parameters</dd>
      <dt>Disk</dt><dd>${number(plan.disk_gib, 3)} GiB</dd>
    </dl>
    ${plan.notes.length ? html`<details><summary>Notes<span class="soft">${plan.notes.length}</span></summary><ul class="small">${plan.notes.map((note) => html`<li>${note}</li>`)}</ul></details>` : null}`;
}

function Bar({ bar, scale, capacity, peak, colours }) {
  const total = bar.parts.reduce((sum, part) => sum + part.gib, 0);
  return html`<span class=${peak ? "" : "soft"}>${bar.phase}</span>
    <span class="bar" role="img" aria-label=${`${number(total, 3)} GiB ${bar.when}`}>${bar.parts.map((part) => html`<i title=${`${part.family}: ${number(part.gib, 3)} GiB`} style=${{ width: `${(100 * part.gib) / scale}%`, background: colours[part.family] }} />`)}
      ${capacity && capacity < scale ? html`<b style=${{ left: `${(100 * capacity) / scale}%` }} />` : null}</span>
    <span class=${peak ? "right" : "right soft"}>${number(total, 3)} GiB</span>`;
}
