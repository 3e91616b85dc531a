// The start page of `dynatree serve`: a chat that shows which tokens were drafted. It asks the routes that everybody asks.
"use strict";

const at = (id) => document.getElementById(id);
const messages = []; // of the conversation, as the route takes them
let info = null; // what the server allows
let running = null; // the AbortController of the answer that is being written

/** An element with a class and a text; texts are never markup. */
function element(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** What an answer with an error says. A server with keys gets a field for one. */
async function fault(response) {
  if (response.status === 401) at("key-part").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with ${response.status}`;
  }
}

async function learn() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await fault(response));
  const [model] = (await response.json()).data;
  info = { name: model.id, ...model.dynatree };
  at("model").textContent = model.id;
  document.title = `${model.id} · DynaTree`;
  for (const [id, names] of [["policy", info.policies], ["drafter", info.drafters]]) {
    at(id).replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name, textContent: name })));
  }
  at("drafter-part").hidden = info.drafters.length < 2;
  at("length").max = info.max_tokens;
  at("trees").hidden = !info.shows_trees;
  if (!info.has_chat_template) at("hint").textContent = "This model holds no conversations: it goes on with what you write.";
}

function turn(who) {
  at("hint")?.remove();
  const box = element("div", "turn");
  const words = element("div", "words");
  box.append(element("h2", "", who), words);
  at("talk").append(box);
  return words;
}

function scroll() {
  at("talk").scrollTop = at("talk").scrollHeight;
}

/** Whether the trees of what is asked now are to be seen: nothing is recorded for nobody. */
const showsTrees = () => info.shows_trees && at("trees").open;

function request(question) {
  const body = {
    model: info.name,
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("length").value),
    stream: true,
    stream_options: { include_usage: true },
    dynatree: { policy: at("policy").value, drafter: at("drafter").value, steps: true, trees: showsTrees() },
  };
  if (!info.has_chat_template) return ["v1/completions", { ...body, prompt: question }];
  return ["v1/chat/completions", { ...body, messages }];
}

/** The records of a stream of server-sent events, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** Show one iteration's tokens: the first `accepted` were drafted, what follows the model chose itself. */
function show(words, step) {
  step.texts.forEach((text, place) => {
    if (text) words.append(element("span", place < step.accepted ? "drafted" : "bonus", text));
  });
}

class Figures {
  constructor() {
    Object.assign(this, { tokens: 0, iterations: 0, drafted: 0, taken: 0, begin: null });
  }

  add(step, isLast) {
    const count = step.texts.length - (isLast ? 1 : 0); // the last record has what was held back, behind its tokens
    if (count === 0) return;
    this.begin ??= performance.now();
    this.tokens += count;
    this.iterations += 1;
    this.drafted += step.drafted;
    this.taken += step.accepted;
  }

  get rate() {
    return this.iterations ? (this.tokens / this.iterations).toFixed(2) : "–";
  }

  show() {
    const seconds = this.begin === null ? 0 : (performance.now() - this.begin) / 1000;
    at("rate").textContent = this.rate;
    at("tokens").textContent = this.tokens;
    at("iterations").textContent = this.iterations;
    at("taken").textContent = `${this.taken} of ${this.drafted}`;
    at("speed").textContent = seconds > 0 ? (this.tokens / seconds).toFixed(1) : "–";
  }
}

async function answer(question, words) {
  const [route, body] = request(question);
  const response = await fetch(route, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
  if (!response.ok) throw new Error(await fault(response));
  const figures = new Figures();
  liveTrees.begin();
  for await (const record of events(response)) {
    if (record.error) throw new Error(record.error.message);
    if (!record.dynatree) continue;
    show(words, record.dynatree);
    for (const step of record.dynatree.trees ?? []) liveTrees.add(step);
    figures.add(record.dynatree, record.choices[0].finish_reason !== null);
    figures.show();
    scroll();
  }
  at("said").textContent = `The answer is there: ${figures.tokens} tokens, ${figures.rate} per iteration.`;
}

function busy(is) {
  at("send").disabled = is;
  at("new").disabled = is;
  at("stop").disabled = !is;
}

async function ask(question) {
  at("error").textContent = "";
  at("said").textContent = "";
  running = new AbortController();
  busy(true);
  try {
    if (info === null) await learn();
    turn("You").textContent = question;
    const words = turn(info.name);
    messages.push({ role: "user", content: question });
    try {
      await answer(question, words);
    } catch (error) {
      words.after(element("p", "cut", error.name === "AbortError" ? "Stopped." : "Cut off."));
      throw error;
    } finally {
      if (words.textContent) messages.push({ role: "assistant", content: words.textContent });
      else messages.pop();
    }
    at("question").value = "";
  } catch (error) {
    if (error.name === "AbortError") at("said").textContent = "The answer was stopped.";
    else at("error").textContent = error.message;
  } finally {
    running = null;
    busy(false);
    scroll();
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question && running === null) ask(question);
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  messages.length = 0;
  at("talk").replaceChildren(element("p", "", "Ask something."));
  at("talk").firstChild.id = "hint";
  at("error").textContent = "";
  at("question").focus();
});
at("key").addEventListener("change", () => learn().catch((error) => (at("error").textContent = error.message)));
at("trees").open = matchMedia("(min-width: 60rem)").matches; // on a phone the answer needs the room
learn()
  .catch((error) => (at("error").textContent = error.message))
  .finally(() => (document.documentElement.dataset.ready = "yes"));
