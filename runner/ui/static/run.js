// A run: its state and curves as they come, its log, and what can be done with it.
import { Chart } from "./chart.js";
import { ask, count, duration, html, known, money, number, Refused, useEffect, useRef, useState } from "./lib.js";
import { Ask, Copy, Problems, State } from "./parts.js";
import { followLaunch, Launch } from "./plan.js";

const COLUMNS = ["step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib"];
const CHARTS = [["learning_rate", "Learning rate"], ["grad_norm", "Gradient norm"], ["tokens_per_second", "Tokens per second"], ["memory_gib", "Memory, GiB"]];
const LOG_CHARACTERS = 200000;
const nothing = () => ({ metrics: Object.fromEntries(COLUMNS.map((name) => [name, []])), evals: { step: [], loss: [] } });

export function Run({ id }) {
  const path = `/api/runs/${encodeURIComponent(id)}`;
  const [facts, setFacts] = useState(null);
  const [state, setState] = useState(null);
  const [lines, setLines] = useState(nothing());
  const [log, setLog] = useState("");
  const [failed, setFailed] = useState(null);
  const [launch, setLaunch] = useState(null);
  const [question, setQuestion] = useState(false);
  const [round, setRound] = useState(0);
  useEffect(() => { ask(path).then((found) => { setFacts(found); setState((now) => now || found.state); }).catch((e) => setFailed(e.problems)); }, [round, state && state.active]);
  useEffect(() => {
    const held = nothing();
    let text = "", timer = 0;
    const draw = () => { timer = 0; setLines({ metrics: Object.fromEntries(COLUMNS.map((n) => [n, held.metrics[n].slice()])), evals: { ...held.evals } }); setLog(text); };
    const later = () => { timer = timer || setTimeout(draw, 200); };
    const feed = new EventSource(`${path}/events`);
    const on = (name, take) => feed.addEventListener(name, (event) => { take(JSON.parse(event.data)); later(); });
    const add = (into, columns) => { for (const name of Object.keys(into)) into[name] = into[name].concat(columns[name]); };
    const clear = () => { Object.assign(held, nothing()); };
    feed.addEventListener("open", () => { clear(); text = ""; });
    on("state", setState);
    on("restart", clear);
    on("metrics", (columns) => add(held.metrics, columns));
    on("evals", (columns) => add(held.evals, columns));
    on("log", (more) => { text = (text + more).slice(-LOG_CHARACTERS); });
    feed.addEventListener("end", () => feed.close());
    return () => { feed.close(); clearTimeout(timer); };
  }, [id, round]);
  if (failed) return html`<${Problems} problems=${failed} /><p><a href="#/runs">All runs</a></p>`;
  if (!facts || !state) return html`<p class="empty">Reading the run …</p>`;
  const act = async (verb) => {
    setQuestion(false);
    try {
      const answer = await ask(`${path}/${verb}`, {});
      if (verb === "resume") { await waitForStart(answer.launch, setLaunch, path); setLaunch(null); setRound((n) => n + 1); }
      if (verb === "delete") location.hash = "#/runs";
      if (verb === "stop") setLaunch({ output: "", stopping: true });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      setLaunch({ problems: error.problems });
    }
  };
  const m = lines.metrics, share = state.num_steps ? Math.min(1, (state.step || 0) / state.num_steps) : 0;
  const can = { stop: state.active, resume: ["interrupted", "failed", "killed"].includes(state.state) };
  return html`<div class="head"><div><h1>${id}</h1><p class="sub">${[state.model, state.method, state.objective, state.data].filter(Boolean).join(" · ")}</p></div>
      <div class="row"><${State} state=${state.state} />
        ${can.stop ? html`<button type="button" id="stop" onClick=${() => act("stop")}>Stop</button>` : null}
        ${can.resume ? html`<button type="button" id="resume" class="main" onClick=${() => act("resume")}>Resume</button>` : null}
        <a class="button" id="report" href=${`${path}/report`} target="_blank" rel="noopener">Report</a>
        ${state.has_model && !state.active ? html`<a class="button" href=${`#/chat/${encodeURIComponent(id)}`}>Chat</a>` : null}
        ${state.active ? null : html`<button type="button" class="danger" id="delete" onClick=${() => setQuestion(true)}>Delete</button>`}</div></div>
    ${state.error ? html`<div class="problem" role="alert"><p>${state.error}</p></div>` : null}
    ${launch && launch.stopping ? (state.active ? html`<p class="soft" role="status">Stopping: it saves a checkpoint first …</p>` : null) : launch ? html`<${Launch} launch=${launch} />` : null}
    <div class="progress" role="progressbar" aria-label="Steps done" aria-valuemin="0" aria-valuemax=${state.num_steps || 1} aria-valuenow=${state.step || 0}><i style=${{ width: `${100 * share}%` }} /></div>
    <div class="meters">
      <${Meter} name="Stage" value=${state.phase || state.state} /><${Meter} name="Step" value=${`${count(state.step || 0)}${state.num_steps ? ` / ${count(state.num_steps)}` : ""}`} />
      <${Meter} name="Loss" value=${number(m.loss.at(-1))} /><${Meter} name="Speed" value=${known(m.tokens_per_second.at(-1)) ? `${count(m.tokens_per_second.at(-1))} tok/s` : "–"} />
      <${Meter} name="Memory" value=${known(m.memory_gib.at(-1)) ? `${number(m.memory_gib.at(-1), 3)} GiB` : "–"} /><${Meter} name=${state.active ? "Time left" : "Time"} value=${duration(state.active ? state.left_seconds : state.seconds)} />
      ${known(state.usd) ? html`<${Meter} name="Cost so far" value=${money(state.usd)} />` : null}
    </div>
    <${Results} summary=${facts.summary} />
    <${Curves} lines=${lines} />
    <${Log} text=${log} />
    <section class="card"><details><summary>Configuration<span class="soft">${facts.path}</span></summary><${Copy} text=${facts.yaml} /><pre tabindex="0">${facts.yaml}</pre></details></section>
    ${question ? html`<${Ask} title="Delete this run?" danger yes="Move it to the trash" onYes=${() => act("delete")} onNo=${() => setQuestion(false)}><p>${facts.path} is moved to the trash beside it. <code>python -m runner runs restore ${id}</code> brings it back.</p><//>` : null}`;
}

async function waitForStart(launch, tell, path) {
  for (;;) {
    const [started, run] = [await ask(`/api/launches/${launch}`), await ask(path)];
    if (run.state.active) return;
    if (!started.running) { if (started.exit_code) { tell(started); throw new Refused([]); } return; }
    tell({ ...started, waiting: true });
    await new Promise((resolve) => { setTimeout(resolve, 300); });
  }
}

const Meter = ({ name, value }) => html`<div class="meter"><span>${name}</span><strong>${value}</strong></div>`;

function Curves({ lines }) {
  const { metrics: m, evals } = lines;
  const held = new Map(evals.step.map((step, i) => [step, evals.loss[i]]));
  const steps = [...new Set([...m.step, ...evals.step])].sort((a, b) => a - b);
  const at = new Map(m.step.map((step, i) => [step, m.loss[i]]));
  const loss = evals.step.length ? [steps, steps.map((s) => at.get(s) ?? null), steps.map((s) => held.get(s) ?? null)] : [m.step, m.loss];
  const [log, setLog] = useState(false);
  return html`<div class="row right-row"><label class="row small"><input type="checkbox" checked=${log} onChange=${(e) => setLog(e.target.checked)} /> Logarithmic loss</label></div>
    <div class="charts"><${Chart} title="Loss" names=${evals.step.length ? ["loss", "held out"] : ["loss"]} columns=${loss} log=${log} />
    ${CHARTS.map(([name, title]) => html`<${Chart} key=${name} title=${title} names=${[title.toLowerCase()]} columns=${[m.step, m[name]]} />`)}</div>`;
}

function Results({ summary }) {
  if (!summary || !summary.eval) return null;
  const { before, after } = summary.eval;
  const names = Object.keys(after).filter((name) => typeof after[name] === "number" && typeof before[name] === "number");
  return names.length ? html`<section class="card"><h2>Held out, before and after</h2><dl class="facts">${names.map((name) => html`<dt>${name.replaceAll("_", " ")}</dt><dd>${number(before[name])} → <strong>${number(after[name])}</strong></dd>`)}</dl></section>` : null;
}

function Log({ text }) {
  const box = useRef(null), stuck = useRef(true);
  useEffect(() => { if (stuck.current) box.current.scrollTop = box.current.scrollHeight; }, [text]);
  return html`<section class="card" aria-label="Log"><h2>Log</h2><pre class="log" tabindex="0" ref=${box} onScroll=${(e) => { const b = e.target; stuck.current = b.scrollHeight - b.scrollTop - b.clientHeight < 30; }}>${text || "Nothing yet."}</pre></section>`;
}
