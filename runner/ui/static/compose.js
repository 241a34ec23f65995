// Compose: the choices, the form of all keys, and beside them the plan and the problems of what is in it.
import { Fit } from "./fit.js";
import { Fields } from "./fields.js";
import { ask, html, number, money, Refused, size, useEffect, useRef, useState } from "./lib.js";
import { Picker, Problems } from "./parts.js";
import { Plan } from "./plan.js";

const CHOICES = [["model", "Model"], ["method", "Method"], ["hw", "Hardware"], ["deepspeed", "ZeRO stage"], ["data", "Data"], ["objective", "Objective"], ["where", "Where"], ["track", "Tracker"]];
const KEPT = "runner.compose";
const PAUSE_MS = 120;
let catalogue = null;

const option = {
  model: (row) => ({ title: row.title, fact: size(row.num_parameters), note: row.id || "" }),
  hw: (row) => ({ title: row.name, fact: row.usd_per_hour ? `${money(row.usd_per_hour * (row.num_gpus || 1))}/h` : "", note: row.gpu ? `${row.num_gpus} × ${row.gpu}, ${number(row.memory_gib, 3)} GiB each` : "" }),
};
const options = (group) => catalogue.groups[group].map((row) => ({ name: row.name, title: row.name, fact: "", note: row.what || "", ...(option[group] ? option[group](row) : {}) }));

export const keep = (asked) => sessionStorage.setItem(KEPT, JSON.stringify(asked));
function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT));
    if (found && found.choices && found.values) return found;
  } catch { /* of another version */ }
  return { recipe: null, choices: {}, values: {} };
}

export function Compose() {
  const [ready, setReady] = useState(Boolean(catalogue));
  const [asked, setAsked] = useState(kept());
  const [found, setFound] = useState({ problems: [], values: null, plan: null });
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState(null);
  const latest = useRef(asked), waiting = useRef(false);
  useEffect(() => {
    if (!ready) ask("/api/catalogue").then((c) => { catalogue = c; setReady(true); }).catch((e) => setFailed(e.problems));
  }, []);
  useEffect(() => {
    keep(asked);
    latest.current = asked;
    setBusy(true);
    const timer = setTimeout(check, PAUSE_MS);
    return () => clearTimeout(timer);
  }, [asked]);
  const check = async () => { // one at a time: what is typed meanwhile is asked for next
    if (waiting.current) return;
    waiting.current = true;
    let about = null;
    while (about !== latest.current) {
      about = latest.current;
      try {
        const answer = await ask("/api/check", about);
        setFound((before) => ({ ...answer, values: answer.values || before.values, resolved: answer.resolved || before.resolved }));
        setFailed(null);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        setFailed(error.problems);
      }
    }
    waiting.current = false;
    setBusy(false);
  };
  if (!ready) return html`<${Problems} problems=${failed} /><p class="empty">Reading the catalogue …</p>`;

  const set = (changes) => setAsked((before) => {
    const choices = { ...before.choices }, values = { ...before.values };
    let { recipe } = before;
    for (const [key, value] of Object.entries(changes)) {
      if (key === "recipe") recipe = value;
      else if (key in catalogue.groups) choices[key] = value;
      else if (value === null) delete values[key];
      else values[key] = value;
    }
    return { recipe, choices, values };
  });
  const begin = (recipe) => setAsked({ recipe: recipe === "none" ? null : recipe, choices: {}, values: {} });
  const chosen = (group) => asked.choices[group] || (found.values && found.values[`${group}.name`]);
  const recipes = [{ name: "none", title: "The demo", fact: "", note: "SmolLM2 135M learns the commands of this runner" }, ...catalogue.recipes.map((r) => ({ name: r.name, title: r.name, fact: "", note: r.what || "" }))];
  const about = (key) => found.problems.filter((p) => p.keys.includes(key));
  return html`<div class="head"><div><h1>Compose a run</h1><p class="sub">Nothing starts until you say so; the plan follows every change.</p></div>
      <button type="button" onClick=${() => begin("none")}>Start over</button></div>
    <div class="split"><div>
      <section class="card" aria-label="Choices"><div class="choices">
        <${Picker} id="pick-recipe" label="Starting point" value=${asked.recipe || "none"} options=${recipes} onPick=${begin} />
        ${CHOICES.map(([group, label]) => html`<${Picker} key=${group} id=${`pick-${group}`} label=${label} value=${chosen(group)} options=${options(group)} onPick=${(name) => set({ [group]: name })} />`)}
      </div></section>
      <${Fit} asked=${asked} onPick=${set} />
      <${Fields} form=${catalogue.form} values=${found.values} resolved=${found.resolved || {}} typed=${asked.values} about=${about} onSet=${set} />
    </div>
    <aside class="aside" aria-label="Plan"><${Plan} found=${found} busy=${busy} asked=${asked} colours=${catalogue.families} failed=${failed} onFix=${set} /></aside></div>`;
}
