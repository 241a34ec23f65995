// Small parts of several rooms: problems with their remedies, a searchable list, a state, a question.
import { html, useEffect, useRef, useState } from "./lib.js";
import { ACTIVE } from "./lib.js";

export function Problems({ problems, onFix }) {
  if (!problems || !problems.length) return null;
  return html`<div role="alert">${problems.map((problem) => html`<${Problem} problem=${problem} onFix=${onFix} />`)}</div>`;
}

function Problem({ problem, onFix }) {
  const fixes = onFix ? problem.fixes : [];
  return html`<div class="problem">
    <p>${problem.what}${problem.source && problem.source !== "page" ? html` <span class="soft small">(${problem.source})</span>` : null}</p>
    ${problem.remedy ? html`<p class="soft small">${problem.remedy}</p>` : null}
    ${fixes.length ? html`<div class="row">${fixes.map((fix) => html`<button class="fix" type="button" onClick=${() => onFix(fix.set)}>${fix.label}</button>`)}</div>` : null}
  </div>`;
}

export function Picker({ id, label, value, options, onPick, invalid }) {
  const [open, setOpen] = useState(false);
  const [filter, setFilter] = useState("");
  const box = useRef(null);
  const button = useRef(null);
  useEffect(() => {
    if (!open) return undefined;
    box.current.querySelector("input").focus();
    const away = (event) => box.current.contains(event.target) || setOpen(false);
    document.addEventListener("pointerdown", away);
    return () => document.removeEventListener("pointerdown", away);
  }, [open]);
  const words = filter.toLowerCase().split(/\s+/);
  const shown = options.filter((o) => words.every((w) => `${o.name} ${o.title} ${o.note} ${o.fact}`.toLowerCase().includes(w)));
  const close = () => { setOpen(false); button.current.focus(); };
  const keys = (event) => {
    if (event.key === "Escape") { close(); return; }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const stops = [...box.current.querySelectorAll(".panel input, .panel li button")];
    stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(document.activeElement) + step))].focus();
  };
  const current = options.find((o) => o.name === value);
  return html`<div class="picker" ref=${box} onKeyDown=${open ? keys : null}>
    <label id=${`${id}-label`} for=${id}>${label}</label>
    <button type="button" id=${id} ref=${button} aria-expanded=${open} aria-labelledby=${`${id}-label ${id}`} data-invalid=${invalid || null} onClick=${() => { setFilter(""); setOpen(!open); }}>
      <span>${current ? current.title || current.name : value || "–"}</span>
    </button>
    ${open ? html`<div class="panel">
      <input type="search" aria-label=${`Search ${label}`} placeholder="Search" value=${filter} onInput=${(e) => setFilter(e.target.value)} />
      <ul>${shown.map((o) => html`<li key=${o.name}><button type="button" aria-pressed=${o.name === value} data-name=${o.name} onClick=${() => { onPick(o.name); close(); }}>
        <span>${o.title || o.name}</span><span class="fact">${o.fact}</span>${o.note ? html`<small>${o.note}</small>` : null}</button></li>`)}
        ${shown.length ? null : html`<li class="soft small">Nothing fits this search.</li>`}</ul>
    </div>` : null}
  </div>`;
}

export const State = ({ state }) => html`<span class=${`pill ${ACTIVE.includes(state) ? "live" : state}`}>${state}</span>`;

export function Ask({ title, children, yes, danger, onYes, onNo }) {
  const box = useRef(null);
  useEffect(() => { box.current.showModal(); }, []);
  return html`<dialog ref=${box} aria-labelledby="ask-title" onCancel=${onNo}>
    <h2 id="ask-title">${title}</h2>${children}
    <div class="row"><button type="button" class=${danger ? "danger" : "main"} onClick=${onYes}>${yes}</button>
    <button type="button" onClick=${onNo}>Cancel</button></div>
  </dialog>`;
}

export function Copy({ text, label = "Copy" }) {
  const [done, setDone] = useState(false);
  const copy = async () => { await navigator.clipboard.writeText(text); setDone(true); setTimeout(() => setDone(false), 1500); };
  return html`<button type="button" onClick=${copy}>${done ? "Copied" : label}</button>`;
}
