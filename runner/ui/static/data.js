// Data: a file as training sees it: format, learned tokens, problems by row, lengths.
import { keep } from "./compose.js";
import { ask, count, html, number, Refused, useState } from "./lib.js";
import { Problems } from "./parts.js";

export function Data() {
  const [path, setPath] = useState("");
  const [model, setModel] = useState("");
  const [found, setFound] = useState(null);
  const [busy, setBusy] = useState("");
  const [failed, setFailed] = useState(null);
  const asked = (file) => ({ choices: model ? { model } : {}, values: file ? { "data.path": file } : {} });
  const attempt = async (what, work) => {
    setBusy(what);
    setFailed(null);
    try { await work(); } catch (error) { if (!(error instanceof Refused)) throw error; setFailed(error.problems); }
    setBusy("");
  };
  const look = (file) => attempt("Reading the rows …", async () => setFound(await ask("/api/preview", { ...asked(file), rows: 5 })));
  const upload = (event) => {
    const [file] = event.target.files;
    if (!file) return;
    event.target.value = "";
    attempt(`Uploading ${file.name} …`, async () => {
      const answer = await ask(`/api/upload?name=${encodeURIComponent(file.name)}`, undefined, { method: "POST", body: file, headers: { "content-type": "application/octet-stream" } });
      setPath(answer.path);
      setFound(await ask("/api/preview", { ...asked(answer.path), rows: 5 }));
    });
  };
  return html`<div class="head"><div><h1>Data</h1><p class="sub">A file as training sees it: coloured tokens are learned.</p></div></div>
    <section class="card"><form class="row" onSubmit=${(e) => { e.preventDefault(); look(path); }}>
      <div class="grow"><label for="path">File, folder or pattern</label><input id="path" placeholder="my.jsonl; empty: the demo's" value=${path} onInput=${(e) => setPath(e.target.value)} /></div>
      <div class="grow"><label for="data-model">Model, for its template</label><input id="data-model" placeholder="smollm2_135m" value=${model} onInput=${(e) => setModel(e.target.value)} /></div>
      <div><label for="upload">Upload</label><input id="upload" type="file" onChange=${upload} /></div>
      <button class="main" disabled=${Boolean(busy)}>Look at it</button></form>
      ${busy ? html`<p class="soft" role="status">${busy}</p>` : null}</section>
    <${Problems} problems=${failed} />${found && !busy && !failed ? html`<${Found} found=${found} path=${path} />` : null}`;
}

function Found({ found, path }) {
  const { preview, stats } = found;
  const most = Math.max(1, ...stats.histogram.map((bin) => bin.rows));
  const use = () => { keep({ recipe: null, choices: {}, values: path ? { "data.path": path } : {} }); location.hash = "#/compose"; };
  return html`<div class="split"><div>
      <section class="card"><h2>Rows</h2>${preview.rows.map((row) => html`<p class="soft small">row ${row.row}, ${row.where}</p>
        <div class="sample" tabindex="0" role="region" aria-label=${`Row ${row.row}`}>${row.segments.map((s) => (s.trained ? html`<mark class="learned">${s.text}</mark>` : s.text))}</div>`)}
        ${preview.rows.length ? null : html`<p class="soft">No row is right.</p>`}</section>
    </div><aside>
      <section class="card"><h2>Format</h2><dl class="facts">${preview.files.map((file) => html`<dt>${file.name}</dt><dd>${file.format || "unknown"}, ${count(file.num_rows)} rows${file.num_wrong ? html`, <span class="bad">${file.num_wrong} wrong</span>` : null}</dd>`)}
        <dt>Learns from</dt><dd>${preview.learns_from}</dd></dl><button type="button" onClick=${use}>Compose a run with it</button></section>
      ${preview.problems.length ? html`<section class="card"><h2>Problems<span class="soft small"> ${count(preview.num_problems)}</span></h2>${preview.problems.map((p) => html`<div class="problem"><p>${p.what} <span class="soft small">(${p.source})</span></p>${p.remedy ? html`<p class="soft small">${p.remedy}</p>` : null}</div>`)}</section>` : null}
      ${stats.length ? html`<section class="card"><h2>Lengths, in tokens</h2>
        <div class="hist" role="img" aria-label=${`Histogram of lengths: median ${stats.length.median}, longest ${stats.length.max}`}>${stats.histogram.map((bin) => html`<i title=${`${bin.from} to ${bin.to}: ${bin.rows} rows`} style=${{ height: `${(100 * bin.rows) / most}%` }} />`)}</div>
        <div class="row small soft"><span class="grow">${stats.histogram[0].from}</span><span>${stats.histogram.at(-1).to}</span></div>
        <dl class="facts"><dt>Median</dt><dd>${count(stats.length.median)}</dd><dt>99%</dt><dd>${count(stats.length.p99)}</dd><dt>Longest</dt><dd>${count(stats.length.max)}</dd><dt>All tokens</dt><dd>${count(stats.num_tokens)}</dd><dt>Learned</dt><dd>${count(stats.num_learned)}</dd><dt>Held out</dt><dd>${count(stats.num_held_out)} rows</dd></dl>
        <h2>Packing</h2><div class="scroll"><table><thead><tr><th class="right">train.max_length</th><th class="right">Rows cut</th><th class="right">Full, packed</th><th class="right">Padded</th></tr></thead><tbody>${stats.at_length.map((at) => html`<tr><td class="right">${count(at.max_length)}</td><td class="right">${count(at.rows_cut)}</td><td class="right">${number(100 * at.packed_share, 3)}%</td><td class="right">${number(100 * at.padded_share, 3)}%</td></tr>`)}</tbody></table></div>
        <p class="soft small">Suggested: ${count(stats.suggested_max_length)} tokens.</p></section>` : null}
    </aside></div>`;
}
