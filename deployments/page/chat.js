// Chat: a conversation in memory, streamed from /v1/chat/completions. Text only ever becomes text nodes.

const $ = (id) => document.getElementById(id);

export function startChat({ authorization, model }) {
  const hint = $("hint"), log = $("log"), form = $("form"), prompt = $("prompt"), send = $("send");
  let messages = [];
  let running = null; // AbortController of the answer that is being streamed

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  $("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    log.replaceChildren(hint);
    prompt.focus();
  });
  async function ask() {
    const text = prompt.value.trim();
    if (!text) return;
    hint.remove();
    prompt.value = "";
    const conversation = messages; // "New chat" makes another one
    conversation.push({ role: "user", content: text });
    bubble(log, "user", "You").text.append(text);
    const answer = bubble(log, "assistant", "Model");
    const streaming = new AbortController();
    running = streaming;
    busy(answer, true);
    const told = { text: "", tokens: 0, started: performance.now(), first: 0, last: 0, end: "" };
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...authorization() },
        body: JSON.stringify(body(conversation)),
        signal: streaming.signal,
      });
      if (!response.ok) throw new Error(await refusal(response));
      for await (const event of events(response.body)) take(event, told, answer);
      if (!told.end) throw new Error("The stream ended before the answer did.");
    } catch (error) {
      if (streaming.signal.aborted) told.end = "stopped";
      else fail(answer, error.message);
    } finally {
      busy(answer, false);
      if (running === streaming) running = null;
      setButton();
    }
    if (told.text) conversation.push({ role: "assistant", content: told.text });
    answer.facts.append(facts(told));
  }

  function body(conversation) {
    const request = { messages: conversation, stream: true, stream_options: { include_usage: true } };
    const temperature = Number.parseFloat($("temperature").value);
    const maxTokens = Number.parseInt($("max-tokens").value, 10);
    if (model()) request.model = model();
    if (Number.isFinite(temperature)) request.temperature = temperature;
    if (Number.isFinite(maxTokens)) request.max_tokens = maxTokens;
    return request;
  }

  async function refusal(response) {
    if (response.status === 401 || response.status === 403) {
      $("settings").open = true;
      $("key").focus();
    }
    const text = await response.text();
    try {
      return JSON.parse(text).error.message;
    } catch {
      return `The server answered ${response.status} ${response.statusText}`.trim();
    }
  }

  function take(event, told, answer) {
    if (event.error) throw new Error(event.error.message ?? "The server failed on this request.");
    if (event.usage) told.tokens = event.usage.completion_tokens;
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) told.end = choice.finish_reason;
    const thought = choice.delta?.reasoning_content ?? "", text = choice.delta?.content ?? "";
    if (!thought && !text) return;
    told.last = performance.now();
    told.first ||= told.last;
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (thought) answer.thought.append(thought);
    answer.thought.hidden = !answer.thought.hasChildNodes();
    if (text) answer.text.append(text);
    told.text += text;
    if (follow) log.scrollTop = log.scrollHeight;
  }

  function busy(answer, on) {
    answer.element.classList.toggle("streaming", on);
    log.setAttribute("aria-busy", String(on));
    answer.text.normalize(); // one text node instead of one for each token
    log.scrollTop = log.scrollHeight;
    setButton();
  }

  function setButton() {
    send.textContent = running ? "Stop" : "Send";
    send.classList.toggle("stop", Boolean(running));
    prompt.required = !running;
  }
}

function bubble(log, kind, who) {
  const element = make("article", `message ${kind}`);
  const parts = { element, who: make("div", "who"), thought: make("div", "thought"), text: make("div", "text"), facts: make("div", "facts") };
  parts.who.textContent = who;
  parts.thought.hidden = true;
  element.append(parts.who, parts.thought, parts.text, parts.facts);
  log.append(element);
  return parts;
}

function fail(answer, message) {
  const error = make("div", "error");
  error.setAttribute("role", "alert");
  error.textContent = message;
  answer.text.after(error);
}

function facts(told) {
  if (!told.first) return told.end === "stopped" ? "stopped" : "";
  const parts = [];
  if (told.tokens) {
    parts.push(`${told.tokens} tokens`);
    const seconds = (told.last - told.first) / 1000;
    if (told.tokens > 1 && seconds > 0.01) parts.push(`${((told.tokens - 1) / seconds).toFixed(0)} tokens/s`);
  }
  parts.push(`first after ${(told.first - told.started).toFixed(0)} ms`);
  if (told.end === "length") parts.push("cut at max tokens");
  if (told.end === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** The JSON of each server-sent event until [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function make(tag, className) {
  const element = document.createElement(tag);
  element.className = className;
  return element;
}
