// The form, made from the schema: every key that applies, with its words, its help and its problems.
import { html, useState } from "./lib.js";

const FIRST = ["data.path", "run.name", "train.max_steps", "train.num_epochs", "train.learning_rate", "train.batch_size", "train.max_length", "method.rank", "where.max_usd"];
const shown = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

export function Fields({ form, values, resolved, typed, about, onSet }) {
  const [search, setSearch] = useState("");
  const applies = (field) => field.key in typed || !values || field.key in values || about(field.key).length > 0;
  const all = form.flatMap((section) => section.fields).filter(applies);
  const one = (field) => html`<${Field} key=${field.key} field=${field} value=${values ? values[field.key] : field.default} resolved=${resolved[field.key]} typed=${typed[field.key]} problems=${about(field.key)} onSet=${onSet} />`;
  const word = search.trim().toLowerCase();
  const hits = word ? all.filter((f) => `${f.key} ${f.sentence}`.toLowerCase().includes(word)) : [];
  const strays = Object.keys(typed).filter((key) => !form.some((s) => s.fields.some((f) => f.key === key)));
  return html`<section class="card" aria-label="Values">
    <div class="row top-row"><h2 class="grow">Values</h2><input class="grow" type="search" aria-label="Find a key" placeholder="Find a key: rank, checkpoint, warm-up …" value=${search} onInput=${(e) => setSearch(e.target.value)} /></div>
    ${strays.map((key) => one({ key, kind: "text", words: [], sentence: "", bounds: {}, optional: false }))}
    ${word ? html`<div class="fields">${hits.map(one)}${hits.length ? null : html`<p class="soft">No key that applies here fits this search.</p>`}</div>`
      : html`<div class="fields">${FIRST.map((key) => all.find((f) => f.key === key)).filter(Boolean).map(one)}</div>
      ${form.map((section) => html`<${Section} key=${section.group} section=${section} fields=${all.filter((f) => f.key.startsWith(`${section.group}.`) && !FIRST.includes(f.key))} typed=${typed} about=${about} one=${one} />`)}`}
  </section>`;
}

function Section({ section, fields, typed, about, one }) {
  const [open, setOpen] = useState(false);
  const wrong = fields.some((f) => about(f.key).length);
  const set = fields.filter((f) => f.key in typed).length;
  if (!fields.length) return null;
  return html`<details open=${open || wrong} onToggle=${(e) => setOpen(e.target.open)}><summary>${section.group}<span class="soft">${fields.length} keys${set ? `, ${set} set` : ""}</span></summary>
    ${open || wrong ? html`<div class="fields">${fields.map(one)}</div>` : null}</details>`;
}

function Field({ field, value, resolved, typed, problems, onSet }) {
  const id = `key-${field.key}`, isSet = typed !== undefined;
  const change = (text) => onSet({ [field.key]: text === "" && !isSet ? null : text === "" ? (field.optional ? "null" : null) : text });
  const wrong = problems.length > 0;
  const described = `${id}-help${wrong ? ` ${id}-wrong` : ""}`;
  const derived = value === "auto" && resolved !== undefined && resolved !== "auto" ? `auto: ${shown(resolved)}` : null;
  const control = field.kind === "choice"
    ? html`<select id=${id} aria-describedby=${described} aria-invalid=${wrong} value=${isSet ? typed : shown(value)} onChange=${(e) => onSet({ [field.key]: e.target.value })}>
        ${field.optional ? html`<option value=${shown(value) === "" ? "" : "null"}>none</option>` : null}
        ${field.words.map((w) => html`<option value=${w}>${w}</option>`)}
        ${isSet && !field.words.includes(typed) && typed !== "null" ? html`<option value=${typed}>${typed}</option>` : null}</select>`
    : html`<input id=${id} aria-describedby=${described} aria-invalid=${wrong} autocomplete="off" spellcheck="false" inputmode=${field.kind === "number" && !field.words.length ? "decimal" : null} list=${field.words.length ? `${id}-words` : null}
        value=${isSet ? (typed === "null" ? "" : typed) : ""} placeholder=${derived || shown(value) || "none"} onInput=${(e) => change(e.target.value)} />
        ${field.words.length ? html`<datalist id=${`${id}-words`}>${field.words.map((w) => html`<option value=${w} />`)}</datalist>` : null}`;
  return html`<div class=${`field${isSet ? " set" : ""}`}>
    <label for=${id}>${field.key}${isSet ? html`<button type="button" class="link" aria-label=${`Reset ${field.key}`} onClick=${() => onSet({ [field.key]: null })}>reset</button>` : null}</label>
    ${control}
    ${wrong ? html`<div id=${`${id}-wrong`} class="wrong" role="alert">${problems.map((p) => html`<p>${p.what}</p>${p.fixes.map((fix) => html`<button class="fix" type="button" onClick=${() => onSet(fix.set)}>${fix.label}</button> `)}`)}</div>` : null}
    <p class="help" id=${`${id}-help`}>${field.sentence.split("`").map((piece, i) => (i % 2 ? html`<code>${piece}</code>` : piece))}</p></div>`;
}
