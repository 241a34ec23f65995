// What all rooms share: Preact, requests, words for numbers. Text goes into the page as text nodes alone.
export * from "/vendor/htm/preact-standalone.module.js";

export class Refused extends Error {
  constructor(problems) {
    super(problems.map((p) => p.what).join("; "));
    this.problems = problems;
  }
}

export async function ask(path, body, options = {}) {
  let answer;
  try {
    answer = await fetch(path, body === undefined ? options : {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), ...options,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw refusal("the server does not answer: is `python -m runner ui` still running?");
  }
  if (answer.ok) return answer.json();
  const text = await answer.text();
  try {
    throw new Refused(JSON.parse(text).problems);
  } catch (error) {
    throw error instanceof Refused ? error : refusal(text.slice(0, 300) || `the server answers ${answer.status}`);
  }
}

export const refusal = (what) => new Refused([{ what, source: null, remedy: null, keys: [], fixes: [] }]);

export const known = (value) => value !== null && value !== undefined;
export const number = (value, digits = 4) => (known(value) ? Number(value).toLocaleString("en", { maximumSignificantDigits: digits }) : "–");
export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
export const money = (value) => (known(value) ? `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}` : "–");
export function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
export function size(parameters) {
  if (!known(parameters)) return "";
  return parameters >= 1e9 ? `${number(parameters / 1e9, 3)} B` : `${number(parameters / 1e6, 3)} M`;
}
export const when = (epoch) => (known(epoch) ? new Date(epoch * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : "–");
export const ACTIVE = ["created", "loading", "evaluating", "training", "saving"];
