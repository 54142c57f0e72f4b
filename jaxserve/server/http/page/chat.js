// The chat: what was said so far goes to the server with every message, and the answer is shown as it comes.

import { call, element, events } from "./server.js";

const NO_TEMPLATE = "the model has no chat template"; // in the server's words
const RETRY_MS = 2000;
const [log, prompt, send, stop, model] = ["log", "prompt", "send", "stop", "model"].map(element);
let messages = [];
let hasTemplate = true;
let answering = null; // the AbortController of the answer under way

async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    model.replaceChildren(...data.map(({ id }) => new Option(id)));
    send.disabled = false;
    element("chat-note").textContent = "";
  } catch (error) {
    element("chat-note").textContent = error.message;
    setTimeout(listModels, RETRY_MS); // it may be warming up
  }
}

function post(path, asked) {
  const fields = [...element("sampling").querySelectorAll("input")].filter((input) => input.value !== "");
  const sampling = Object.fromEntries(fields.map((input) => [input.name, Number(input.value)]));
  const body = { model: model.value, ...asked, ...sampling, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal: answering.signal });
}

async function ask(text) {
  if (hasTemplate) {
    try {
      return await post("v1/chat/completions", { messages });
    } catch (error) {
      if (!error.message.includes(NO_TEMPLATE)) throw error;
    }
    hasTemplate = false;
    element("plain").hidden = false;
  }
  return post("v1/completions", { prompt: text });
}

// A message in the log; its text grows by append, which takes it for nothing but text.
function show(who, text) {
  const [article, title, said, note] = ["article", "h3", "p", "p"].map((tag) => document.createElement(tag));
  title.append(who);
  said.append(text);
  note.className = "note";
  article.append(title, said, note);
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, said, note };
}

async function talk(text) {
  const { signal } = answering;
  const question = show("You", text);
  const { article, said, note } = show(model.value, "");
  messages.push({ role: "user", content: text });
  const started = performance.now();
  let first, finish, usage;
  try {
    for await (const event of events(await ask(text))) {
      first ??= performance.now();
      usage = event.usage ?? usage;
      const [choice] = event.choices;
      finish = choice?.finish_reason ?? finish;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      said.append(choice?.delta?.content ?? choice?.text ?? "");
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    note.textContent = account(usage.completion_tokens, first - started, performance.now() - first, finish);
  } catch (error) {
    note.textContent = signal.aborted ? "Stopped." : error.message;
    note.classList.toggle("error", !signal.aborted);
  }
  if (!article.isConnected) return; // a new chat has begun meanwhile
  log.scrollTop = log.scrollHeight;
  if (said.textContent) messages.push({ role: "assistant", content: said.textContent });
  else {
    messages.pop(); // an unanswered question may be asked again
    prompt.value ||= question.said.textContent;
  }
}

function account(tokens, firstMs, restMs, finish) {
  const rate = tokens > 1 ? `, then ${(((tokens - 1) / restMs) * 1000).toFixed(1)} a second` : "";
  const cut = finish === "length" ? "; cut at the limit of tokens" : "";
  return `${tokens} tokens, the first after ${(firstMs / 1000).toFixed(2)} s${rate}${cut}`;
}

// Screen readers wait for the end of a busy region; the focus stays on a button that works.
function setBusy(busy) {
  log.ariaBusy = busy;
  stop.disabled = false;
  if (busy && document.activeElement === send) stop.focus();
  if (!busy && document.activeElement === stop) prompt.focus();
  [send.disabled, stop.disabled] = [busy, !busy];
}

element("chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (answering) return;
  const text = prompt.value;
  prompt.value = "";
  answering = new AbortController();
  setBusy(true);
  await talk(text);
  answering = null;
  setBusy(false);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!send.disabled) event.target.form.requestSubmit();
});
stop.addEventListener("click", () => answering?.abort());
element("clear").addEventListener("click", () => {
  answering?.abort();
  messages = [];
  log.replaceChildren();
  prompt.focus();
});
listModels();
