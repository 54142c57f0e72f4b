// Calls to the server that this page came from, with an API key where it wants one.

export const element = (id) => document.getElementById(id);

const KEY = "jaxserve-api-key";
const form = element("key-form");
let nextKey = null; // what all calls that were refused wait for

// The response, if it is a success. Throws an Error in the server's words.
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the server does not answer");
    });
    if (response.ok) return response;
    const message = await errorOf(response);
    if (response.status !== 401) throw new Error(message);
    // Unless another call has got a new one meanwhile.
    if (sessionStorage.getItem(KEY) === key) await askForKey(message);
  }
}

// The events of a streamed response, parsed. Throws an Error in the server's words.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was closed");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`; // or a proxy before it
  }
}

function askForKey(message) {
  element("key-note").textContent = message;
  if (form.hidden) {
    form.hidden = false;
    form.elements.key.focus();
  }
  nextKey ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, form.elements.key.value);
      form.reset();
      form.hidden = true;
      element("prompt").focus();
      nextKey = null;
      resolve();
    };
  });
  return nextKey;
}
