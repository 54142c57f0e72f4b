// The live view: asks for the steps since the last time, and draws them, while the tab can be seen.

import { call, element } from "./server.js";

const POLL_MS = 1000;
const [SHOWN_STEPS, HEIGHT, LEAST_HEIGHT] = [120, 100, 0.7]; // in the drawing's units: one decode must be seen
const PARTS = { decodes: "num_decode_tokens", prefills: "num_prefill_tokens", padding: "num_padding_tokens" };
const chosen = element("engine");
let steps = [];
let since = 0;

function reset() {
  steps = [];
  since = 0;
}

async function update() {
  const engine = chosen.value || "0";
  const live = await (await call(`debug/steps?engine=${engine}&since=${since}`)).json();
  if (engine !== (chosen.value || "0")) return; // chosen meanwhile
  if (live.last_step < since) return reset(); // the server has started again
  steps = [...steps, ...live.steps].slice(-SHOWN_STEPS);
  since = steps.at(-1)?.number ?? 0;
  offerEngines(live.num_engines);
  drawBars(live.token_budget);
  write(live);
}

function offerEngines(number) {
  if (chosen.length === number) return;
  chosen.replaceChildren(...Array.from({ length: number }, (_, index) => new Option(index)));
  element("engine-label").hidden = number === 1;
}

function drawBars(budget) {
  const sums = steps.map((step) => Object.values(PARTS).reduce((sum, field) => sum + step[field], 0));
  const scale = HEIGHT / Math.max(budget * 1.04, ...sums);
  const tops = steps.map(() => HEIGHT);
  for (const [id, field] of Object.entries(PARTS)) {
    const bars = steps.map((step, index) => {
      if (!step[field]) return "";
      const height = Math.max(step[field] * scale, LEAST_HEIGHT);
      tops[index] -= height;
      return `M${index} ${tops[index]}h.8v${height}h-.8z`;
    });
    element(id).setAttribute("d", bars.join(""));
  }
  for (const end of ["y1", "y2"]) element("budget-line").setAttribute(end, HEIGHT - budget * scale);
}

function write(live) {
  const text = { budget: live.token_budget, running: live.num_running, waiting: live.num_waiting };
  text["kv-text"] = `${live.num_used_blocks} of ${live.num_kv_blocks}`;
  if (live.cached_share !== null) text.cached = `${(100 * live.cached_share).toFixed(0)} %`;
  if (live.acceptance !== null) text.acceptance = `${(100 * live.acceptance).toFixed(0)} %`;
  element("drafts").hidden = live.acceptance === null;
  [element("kv").max, element("kv").value] = [live.num_kv_blocks, live.num_used_blocks];
  for (const name of ["ttft", "tbt"]) {
    for (const percent of ["p50", "p99"]) text[`${name}-${percent}`] = time(live[`${name}_seconds`][percent]);
  }
  const last = steps.at(-1);
  if (last) {
    const longest = Math.max(...steps.map((step) => step.seconds));
    text["last-step"] =
      `Step ${last.number} took ${time(last.seconds)}, the longest of these ${time(longest)}. Of its tokens, decodes: ` +
      `${last.num_decode_tokens}, prompt chunks: ${last.num_prefill_tokens}, padding: ${last.num_padding_tokens}.`;
  }
  for (const [id, value] of Object.entries(text)) element(id).textContent = value;
}

function time(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${(seconds * 1000).toFixed(1)} ms` : `${seconds.toFixed(2)} s`;
}

function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

chosen.addEventListener("change", reset);
for (;;) {
  await seen();
  const note = await update().then(() => "", (error) => error.message);
  if (element("live-note").textContent !== note) element("live-note").textContent = note;
  await new Promise((resolve) => setTimeout(resolve, POLL_MS));
}
