// The frame of the page, and which room its address names.
import { html, render, useEffect, useRef, useState } from "./lib.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Compose } from "./compose.js";
import { Data } from "./data.js";
import { Pods } from "./pods.js";
import { Run } from "./run.js";
import { Runs } from "./runs.js";

const ROOMS = [["compose", "Compose"], ["data", "Data"], ["runs", "Runs"], ["chat", "Chat"], ["pods", "Pods"]];

function place() {
  const [room, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return { room: room || "compose", rest: rest.map(decodeURIComponent) };
}

function Page() {
  const [at, setAt] = useState(place());
  const main = useRef(null);
  useEffect(() => {
    const moved = () => { setAt(place()); window.scrollTo(0, 0); main.current.focus({ preventScroll: true }); };
    window.addEventListener("hashchange", moved);
    return () => window.removeEventListener("hashchange", moved);
  }, []);
  useEffect(() => { document.title = `${at.rest[0] || (ROOMS.find(([r]) => r === at.room) || ["", "Page"])[1]} · runner`; }, [at]);
  const room = { compose: () => html`<${Compose} />`, runs: () => html`<${Runs} />`, data: () => html`<${Data} />`, pods: () => html`<${Pods} />`, chat: () => html`<${Chat} key=${at.rest[0] || ""} id=${at.rest[0]} />`, run: () => html`<${Run} key=${at.rest[0]} id=${at.rest[0]} />`, compare: () => html`<${Compare} key=${at.rest.join("/")} ids=${at.rest} />` }[at.room];
  return html`<a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); main.current.focus(); }}>To the content</a>
    <header class="top"><a class="brand" href="#/compose"><img src="/static/icon.svg" alt="" /><span>runner</span></a>
      <nav aria-label="Rooms">${ROOMS.map(([name, title]) => html`<a href=${`#/${name}`} aria-current=${at.room === name || (name === "runs" && ["run", "compare"].includes(at.room)) ? "page" : null}>${title}</a>`)}</nav></header>
    <main id="main" tabindex="-1" ref=${main}>${room ? room() : html`<p class="empty">There is no such page. <a href="#/compose">Compose a run</a></p>`}</main>`;
}

const root = document.getElementById("app");
root.textContent = "";
render(html`<${Page} />`, root);
