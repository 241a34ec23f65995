// Chat: a run's model and its base beside each other, in one process that is ended by a button.
import { ask, count, html, Refused, refusal, useEffect, useState } from "./lib.js";
import { Problems } from "./parts.js";

export function Chat({ id }) {
  const [runs, setRuns] = useState([]);
  const [run, setRun] = useState(id || "");
  const [prompt, setPrompt] = useState("");
  const [tokens, setTokens] = useState("128");
  const [heat, setHeat] = useState("0");
  const [said, setSaid] = useState({});
  const [busy, setBusy] = useState(null);
  const [failed, setFailed] = useState(null);
  useEffect(() => { ask("/api/runs").then((rows) => { const done = rows.filter((r) => r.state === "done"); setRuns(done); setRun((now) => now || (done[0] || {}).run_id || ""); }).catch((e) => setFailed(e.problems)); }, []);
  const answer = async (side) => {
    setBusy(side);
    setSaid((now) => ({ ...now, [side]: { text: "" } }));
    const response = await fetch("/api/chat", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ run, side, prompt, max_new_tokens: Number(tokens), temperature: Number(heat) }) });
    if (!response.ok) { const text = await response.text(); let problems; try { ({ problems } = JSON.parse(text)); } catch { ({ problems } = refusal(text)); } throw new Refused(problems); }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const piece = JSON.parse(block.slice(block.indexOf("data: ") + 6));
        setSaid((now) => ({ ...now, [side]: { ...now[side], ...piece, text: now[side].text + (piece.text || "") } }));
        if (piece.error === "stopped") throw new Refused([]);
      }
    }
  };
  const send = async (event) => {
    event.preventDefault();
    setFailed(null);
    setSaid({});
    try { for (const side of ["tuned", "base"]) await answer(side); } catch (error) { if (!(error instanceof Refused)) throw error; setFailed(error.problems); }
    setBusy(null);
  };
  const box = (side, title) => html`<section class="card" aria-label=${title}><h2>${title}</h2><div class="answer" id=${`answer-${side}`} aria-live="polite" aria-busy=${busy === side}>${said[side] ? said[side].text || (busy === side ? html`<span class="soft">Loading the model, or thinking …</span>` : null) : html`<span class="soft">–</span>`}</div>
    ${said[side] && said[side].error && said[side].error !== "stopped" ? html`<p class="wrong">${said[side].error}</p>` : said[side] && said[side].done ? html`<p class="soft small">${count(said[side].tokens)} tokens</p>` : null}</section>`;
  return html`<div class="head"><div><h1>Chat</h1><p class="sub">The trained model beside the one it began as, one in memory at a time.</p></div>
      <button type="button" id="chat-stop" onClick=${() => ask("/api/chat/stop", {})}>${busy ? "Stop" : "Unload the model"}</button></div>
    <section class="card"><form onSubmit=${send}>
      <div class="choices"><div><label for="chat-run">Run</label><select id="chat-run" value=${run} onChange=${(e) => setRun(e.target.value)}>${[...new Set([...(run ? [run] : []), ...runs.map((r) => r.run_id)])].map((r) => html`<option>${r}</option>`)}</select></div>
        <div><label for="chat-tokens">Longest answer, tokens</label><input id="chat-tokens" type="number" min="1" max="2048" value=${tokens} onInput=${(e) => setTokens(e.target.value)} /></div>
        <div><label for="chat-heat">Temperature; 0 is greedy</label><input id="chat-heat" type="number" min="0" max="2" step="0.1" value=${heat} onInput=${(e) => setHeat(e.target.value)} /></div></div>
      <p><label for="prompt">Prompt</label><textarea id="prompt" rows="3" value=${prompt} onInput=${(e) => setPrompt(e.target.value)} placeholder="Fine-tune Mistral with 4-bit QLoRA on three H100s." /></p>
      <button class="main" id="send" disabled=${!run || !prompt.trim() || Boolean(busy)}>Ask both</button></form></section>
    <${Problems} problems=${failed} />
    <div class="talk">${box("tuned", "Trained")}${box("base", "Base")}</div>`;
}
