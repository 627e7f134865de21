"use strict";
const $ = (id) => document.getElementById(id);
const SEEN = { about: "", running: null, pinned: null };

// --- the picture ---

function show(url, about) {
  stop();
  $("picture").src = url;
  $("picture").hidden = false;
  $("hint").hidden = true;
  SEEN.about = about;
  for (const card of [$("with"), $("without")]) clear(card);
  unpin();
}

function take(file) {
  if (!file) return;
  if (file.size > 1e6 * document.querySelector(".desk").dataset.megabytes) {
    $("about").textContent = `${file.name} is too large: the limit is ${document.querySelector(".desk").dataset.megabytes} MB.`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { press(null); show(reader.result, file.name); };
  reader.readAsDataURL(file);
}

function press(button) {
  for (const each of document.querySelectorAll(".examples button")) each.setAttribute("aria-pressed", each === button);
  $("right").textContent = "";
}

function choose(button) {
  press(button);
  $("question").value = button.dataset.question;
  show(button.querySelector("img").src, "");
}

// --- where a memory looked ---

function heat(mark) {
  const look = mark && mark.look;
  $("heat").hidden = !look || look.maps.length !== 1 || !look.maps[0];
  for (const each of document.querySelectorAll(".text .chip")) each.setAttribute("aria-pressed", each === SEEN.pinned);
  if (!look) { $("about").textContent = SEEN.about; return; }
  const share = `${Math.round(100 * look.share)} % of this ${mark.kind} memory's attention is on the picture`;
  if ($("heat").hidden) { $("about").textContent = `${share}; it has no map here, since the model sees the picture in tiles.`; return; }
  const grid = look.maps[0], most = Math.max(...grid.flat());
  const canvas = $("heat"), context = canvas.getContext("2d");
  canvas.width = grid[0].length;
  canvas.height = grid.length;
  context.fillStyle = "rgba(255, 255, 255, 0.55)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = mark.kind === "short" ? "#0072b2" : "#d55e00";
  grid.forEach((row, y) => row.forEach((weight, x) => {
    context.globalAlpha = 0.85 * weight / most;
    context.fillRect(x, y, 1, 1);
  }));
  $("about").textContent = `${share}, the rest on ${mark.kind === "short" ? "its own tokens" : "the text and its own tokens"}.`;
}

function unpin() { SEEN.pinned = null; heat(null); }

function mark(kind) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: `chip ${kind}`, textContent: kind, disabled: true, kind });
  button.setAttribute("aria-label", `${kind} memory: show where it looked`);
  button.onpointerenter = button.onfocus = () => heat(button);
  button.onpointerleave = button.onblur = () => heat(SEEN.pinned);
  button.onclick = () => { SEEN.pinned = SEEN.pinned === button ? null : button; heat(SEEN.pinned); };
  return button;
}

// --- questions and answers ---

function clear(card) {
  card.querySelector(".text").replaceChildren();
  card.querySelector(".text").classList.remove("waiting", "fault");
  card.querySelector(".took").textContent = "";
}

async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function answer(card, memory, signal) {
  const text = card.querySelector(".text"), started = performance.now(), marks = [];
  let first = null, finish = null, usage = null;
  clear(card);
  text.classList.add("waiting");
  try {
    const content = [{ type: "image_url", image_url: { url: $("picture").src } }, { type: "text", text: $("question").value }];
    const body = {
      model: document.querySelector(".desk").dataset.model,
      messages: [{ role: "user", content }],
      max_completion_tokens: Number($("tokens").value),
      temperature: Number($("temperature").value),
      seed: Number($("seed").value),
      stream: true,
      stream_options: { include_usage: true },
      vismem: { memory, attention: !["off", "vanilla"].includes(memory) },
    };
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      for (const choice of event.choices) {
        const said = choice.vismem || {};
        if (said.memory) { marks.push(mark(said.memory)); text.append(marks.at(-1)); }
        if (said.attention) {
          const looked = marks.find((each) => !each.look);
          Object.assign(looked, { look: said.attention, disabled: false });
        }
        if (choice.delta.content) {
          text.append(choice.delta.content);
          first ??= performance.now() - started;
        }
        finish = choice.finish_reason || finish;
      }
    }
    const seconds = (performance.now() - started) / 1000;
    const cut = finish === "length" ? ", cut at the longest answer" : "";
    card.querySelector(".took").textContent =
      `${usage.completion_tokens} tokens in ${seconds.toFixed(2)} s${cut}; the first after ${((first ?? 1000 * seconds) / 1000).toFixed(2)} s. ` +
      `The prompt has ${usage.prompt_tokens} tokens.` + (marks.length ? ` ${marks.length} ${marks.length === 1 ? "memory" : "memories"}.` : "");
  } catch (error) {
    if (signal.aborted) { card.querySelector(".took").textContent = "Stopped."; return; }
    text.classList.add("fault");
    text.textContent = error.message;
  } finally {
    text.classList.remove("waiting");
  }
}

function stop() {
  if (SEEN.running) SEEN.running.abort();
  SEEN.running = null;
  $("stop").disabled = true;
}

async function ask(event) {
  event.preventDefault();
  if ($("picture").hidden) { $("about").textContent = "Choose a picture first."; return; }
  stop();
  unpin();
  const running = SEEN.running = new AbortController();
  const example = document.querySelector(".examples [aria-pressed=true]");
  $("right").textContent = example && example.dataset.question === $("question").value ? `Right is: ${example.dataset.answer}` : "";
  $("stop").disabled = false;
  await Promise.all([answer($("with"), $("memory").value, running.signal), answer($("without"), "vanilla", running.signal)]);
  if (SEEN.running === running) stop();
}

$("file").onchange = () => take($("file").files[0]);
$("stage").ondragover = (event) => { event.preventDefault(); $("stage").classList.add("over"); };
$("stage").ondragleave = () => $("stage").classList.remove("over");
$("stage").ondrop = (event) => { event.preventDefault(); $("stage").classList.remove("over"); take(event.dataTransfer.files[0]); };
$("form").onsubmit = ask;
$("stop").onclick = stop;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
};
document.onkeydown = (event) => { if (event.key === "Escape") unpin(); };
const examples = document.querySelectorAll(".examples button");
for (const button of examples) button.onclick = () => choose(button);
if (examples.length) choose(examples[Math.min(4, examples.length - 1)]);
