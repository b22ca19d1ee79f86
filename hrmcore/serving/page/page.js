// The chat page: asks /v1/chat/completions and shows the answer as it streams. No library, nothing from elsewhere.
import { element, lensButton } from "./lens.js";

const find = (id) => document.getElementById(id);
const form = find("composer"), log = find("log"), question = find("question");
const turns = []; // what was said: {role, content}
let running = null; // the AbortController of the answer that streams

function addTurn(role, text) {
  const article = element("article", undefined, role);
  article.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const body = element("p", text), note = element("footer");
  article.append(body, note);
  note.hidden = true;
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, body, note };
}

function request(text) {
  const fields = {
    messages: [],
    stream: true,
    stream_options: { include_usage: true },
    return_token_ids: true,
    condition: find("condition").value || undefined,
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const value = form.elements[name].value;
    if (value !== "") fields[name] = Number(value);
  }
  const system = find("system").value.trim();
  if (system) fields.messages.push({ role: "system", content: system });
  if (find("remember").checked) fields.messages.push(...turns);
  fields.messages.push({ role: "user", content: text });
  return fields;
}

// The objects of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function headers() {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function stream(asked, shown, ids) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(asked), signal: running.signal };
  const started = performance.now();
  const response = await fetch("v1/chat/completions", options);
  if (!response.ok) throw new Error((await response.json()).error.message);
  let first = null, reason = "", tokens = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      const piece = choice.delta.content || "";
      ids.push(...(choice.token_ids || []));
      if (piece) {
        first ??= performance.now() - started;
        const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        shown.body.append(piece);
        if (below) log.scrollTop = log.scrollHeight;
      }
      reason = choice.finish_reason || reason;
    }
  }
  const seconds = (performance.now() - started) / 1000;
  const notes = [`${tokens} tokens`, `${(tokens / seconds).toFixed(0)} tokens/s`];
  if (first !== null) notes.push(`first after ${first.toFixed(0)} ms`);
  if (reason === "length") notes.push("cut: the longest answer was reached");
  return notes.join(", ");
}

async function ask(text) {
  find("samples").hidden = true;
  addTurn("user", text);
  const shown = addTurn("assistant", ""), asked = request(text), ids = [];
  let failed = false;
  shown.article.classList.add("waiting");
  running = new AbortController();
  find("send").hidden = true;
  find("stop").hidden = false;
  try {
    shown.note.textContent = await stream(asked, shown, ids);
  } catch (error) {
    failed = error.name !== "AbortError";
    shown.note.textContent = failed ? error.message : "stopped";
    shown.note.classList.toggle("bad", failed);
  }
  shown.note.hidden = false;
  shown.article.classList.remove("waiting");
  if (ids.length) {
    const { messages, condition } = asked;
    shown.article.append(lensButton(shown.article, { messages, condition }, ids, headers));
  }
  if (!failed && shown.article.isConnected) { // a new chat may have begun meanwhile
    turns.push({ role: "user", content: text }, { role: "assistant", content: shown.body.textContent });
  }
  running = null;
  find("send").hidden = false;
  find("stop").hidden = true;
  log.scrollTop = log.scrollHeight;
  question.focus();
}

function submit() {
  const text = question.value;
  if (running || !text.trim() || !form.reportValidity()) return;
  question.value = "";
  ask(text);
}

function clear() {
  running?.abort();
  turns.length = 0;
  log.querySelectorAll("article").forEach((article) => article.remove());
  find("samples").hidden = !find("sample-list").children.length;
  question.focus();
}

function size(count) {
  const [value, unit] = count >= 1e9 ? [count / 1e9, "B"] : [count / 1e6, "M"];
  return `${value.toFixed(2)} ${unit} parameters`;
}

async function introduce() {
  const about = await (await fetch("page.json")).json();
  find("model").textContent = document.title = about.model;
  find("about").textContent = `${size(about.parameters)}, a context of ${about.context} tokens`;
  find("condition").append(...about.conditions.map((name) => element("option", name)));
  find("key-field").hidden = !about.keyed;
  find("settings").open = about.keyed;
  const seen = new Set();
  for (const sample of about.samples) {
    if (seen.has(sample.task)) continue;
    seen.add(sample.task);
    const button = element("button"), item = element("li");
    button.type = "button";
    const lines = sample.instruction.split("\n");
    button.append(element("small", sample.task.replaceAll("_", " ")), lines[0] + (lines.length > 1 ? " …" : ""));
    button.addEventListener("click", () => running || ask(sample.instruction));
    item.append(button);
    find("sample-list").append(item);
  }
  find("samples").hidden = !seen.size || turns.length > 0;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", clear);
introduce();
