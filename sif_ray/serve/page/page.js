// Sends a picture with a question, and shows what the model looks at while it is writing.

const find = (id) => document.getElementById(id);
const settings = JSON.parse(find("settings").textContent);
const TYPES = ["image/png", "image/jpeg", "image/webp"];
const TINY_PX = 256; // the pixels of a picture up to this size are shown as squares
const REPLAY_STEP_MS = 1600;
const WHOLE = [0, 0, 1, 1];
const CUT_OFF = "The connection ended before the answer was whole.";
const UNREACHABLE = "The server cannot be reached.";

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// --- words -----------------------------------------------------------------------------------------------------------

function depthInWords(depth) {
  if (depth === null) return "depth not stated";
  return `depth ${depth.toFixed(2)}, ${depth < 0.4 ? "near" : depth > 0.6 ? "far" : "middle"}`;
}

function placeInWords([left, top, right, bottom]) {
  const percent = (fraction) => Math.round(100 * fraction);
  if (left <= 0 && top <= 0 && right >= 1 && bottom >= 1) return "the whole picture";
  return `from ${percent(left)} to ${percent(right)} % across and ${percent(top)} to ${percent(bottom)} % down`;
}

const boxInWords = (box) => `${placeInWords(box.bbox_xyxy_norm)} (${depthInWords(box.depth)})`;

function listInWords(boxes) {
  return boxes.length ? boxes.map(boxInWords).join("; ") : "no place that can be read";
}

// For screen readers: what is added to the log is read out.
const announce = (words) => find("news").append(element("p", { textContent: words }));

// --- the two pictures --------------------------------------------------------------------------------------------------

class View {
  constructor(id) {
    this.figure = find(id);
    this.frame = this.figure.querySelector(".frame");
    this.image = this.figure.querySelector("img");
    this.mask = this.figure.querySelector("mask");
    this.layer = this.figure.querySelector(".boxes");
    this.shown = [];
    this.image.addEventListener("load", () => {
      const { naturalWidth, naturalHeight } = this.image;
      this.frame.style.setProperty("--ratio", naturalWidth / naturalHeight);
      this.image.classList.toggle("tiny", Math.max(naturalWidth, naturalHeight) <= TINY_PX);
    });
  }

  // Frames that stay glide to their new place; a further one parts from the last.
  focus(boxes) {
    const from = this.shown.length ? this.shown[this.shown.length - 1].place : WHOLE;
    while (this.shown.length > boxes.length) {
      const { box, hole } = this.shown.pop();
      box.remove();
      hole.remove();
    }
    boxes.forEach((stated, index) => {
      if (index === this.shown.length) this.shown.push(this.#add(from));
      const { box } = this.shown[index];
      this.#put(this.shown[index], stated.bbox_xyxy_norm);
      box.firstChild.textContent = stated.depth === null ? "?" : stated.depth.toFixed(2);
    });
    this.figure.classList.toggle("focused", boxes.length > 0);
  }

  #add(place) {
    const made = { box: element("div", { className: "box" }, element("span")) };
    made.hole = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    this.layer.append(made.box);
    this.mask.append(made.hole);
    this.#put(made, place);
    made.box.getBoundingClientRect(); // laid out here, it glides from here
    return made;
  }

  #put(shown, place) {
    const [left, top, right, bottom] = place;
    shown.place = place;
    const { box, hole } = shown;
    Object.assign(box.style, {
      left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%`,
    });
    Object.assign(hole.style, {
      x: `${1000 * left}px`, y: `${1000 * top}px`, width: `${1000 * (right - left)}px`, height: `${1000 * (bottom - top)}px`,
    });
    box.classList.toggle("low", top < 0.1);
    box.classList.toggle("full", top < 0.1 && bottom > 0.9);
    box.classList.toggle("right", left > 0.8);
  }
}

const photo = new View("photo");
const depth = new View("depth");

// Depth of every colour of a depth image, by its own palette: entry i of 256 stands for depth i / 255.
class DepthScale {
  #colours = [];
  #depths = new Map();
  #pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

  constructor(png) {
    const chunks = new DataView(png.buffer);
    for (let at = 8; at < png.length; at += 12 + chunks.getUint32(at)) {
      if (chunks.getUint32(at + 4) !== 0x504c5445) continue; // "PLTE"
      for (let entry = at + 8; entry < at + 8 + chunks.getUint32(at); entry += 3) {
        this.#depths.set(String(png.slice(entry, entry + 3)), this.#colours.length / 255);
        this.#colours.push([...png.slice(entry, entry + 3), 255]);
      }
    }
  }

  draw(canvas) {
    canvas.width = this.#colours.length;
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(this.#colours.flat()), canvas.width), 0, 0);
  }

  // Depth of a pixel, undefined where a browser changes colours.
  at(image, x, y) {
    this.#pixel.drawImage(image, x, y, 1, 1, 0, 0, 1, 1);
    return this.#depths.get(String(this.#pixel.getImageData(0, 0, 1, 1).data.slice(0, 3)));
  }
}

let scale = null;

function showDepth(base64) {
  const png = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  depth.image.src = `data:image/png;base64,${base64}`;
  depth.image.hidden = false;
  depth.figure.querySelector(".wait").hidden = true;
  scale = new DepthScale(png);
  scale.draw(find("bar"));
  find("scale").hidden = false;
}

depth.frame.addEventListener("pointermove", (event) => {
  if (depth.image.hidden) return;
  const area = depth.frame.getBoundingClientRect();
  const { naturalWidth, naturalHeight } = depth.image;
  const x = Math.min(Math.floor(((event.clientX - area.left) / area.width) * naturalWidth), naturalWidth - 1);
  const y = Math.min(Math.floor(((event.clientY - area.top) / area.height) * naturalHeight), naturalHeight - 1);
  const value = scale.at(depth.image, x, y);
  find("pointed").textContent = value === undefined ? "" : `${depthInWords(value)}, at the pointer`;
});
depth.frame.addEventListener("pointerleave", () => (find("pointed").textContent = ""));

// --- looks -----------------------------------------------------------------------------------------------------------

let steps = [];
let selected = -1;
let following = true; // the newest look, until somebody picks another one
let replaying = 0;

function putStep(index, step) {
  steps[index] = step;
  const list = find("steps");
  while (list.children.length <= index) list.append(element("li", {}, stepButton(list.children.length)));
  const button = list.children[index].firstChild;
  const said = button.querySelector(".said");
  if (said.textContent !== step.text) said.textContent = step.text;
  button.querySelector(".far").textContent = step.boxes.map((box) => depthInWords(box.depth)).join("; ") || "no box";
}

function stepButton(index) {
  const number = element("span", { className: "number", textContent: index + 1 });
  const words = [element("span", { className: "said" }), element("span", { className: "far" })];
  const button = element("button", { type: "button" }, number, ...words);
  const pick = () => {
    following = false;
    stopReplay();
    select(index);
  };
  button.addEventListener("focus", pick); // keys
  button.addEventListener("click", pick); // not every browser focuses what is clicked
  return button;
}

function select(index) {
  const buttons = [...find("steps").querySelectorAll("button")];
  buttons.forEach((button, place) => {
    if (place === index) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });
  selected = index;
  show(index);
  const list = find("steps");
  if (list.scrollHeight > list.clientHeight) buttons[index].scrollIntoView({ block: "nearest" });
}

function show(index) {
  const { boxes } = steps[index];
  photo.focus(boxes);
  depth.focus(boxes);
  photo.image.alt = `Photo. Look ${index + 1}: ${listInWords(boxes)}.`;
  depth.image.alt = `Depth map, red is near and blue is far. Look ${index + 1}: ${listInWords(boxes)}.`;
  const marks = boxes.filter((box) => box.depth !== null).map((box) => {
    const mark = element("i");
    mark.style.left = `${100 * Math.min(Math.max(box.depth, 0), 1)}%`;
    return mark;
  });
  find("marks").replaceChildren(...marks);
}

const tellStep = (index) => announce(`Look ${index + 1}: ${listInWords(steps[index].boxes)}. ${steps[index].text}`);

find("steps").addEventListener("keydown", (event) => {
  const moves = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const index = Math.min(Math.max(selected + moves[event.key], 0), steps.length - 1);
  find("steps").children[index].firstChild.focus();
});

function stopReplay() {
  clearTimeout(replaying);
  replaying = 0;
  find("replay").ariaPressed = "false";
}

find("replay").addEventListener("click", () => {
  if (replaying) return stopReplay();
  find("replay").ariaPressed = "true";
  const play = (index) => {
    select(index);
    replaying = setTimeout(() => (index + 1 < steps.length ? play(index + 1) : stopReplay()), REPLAY_STEP_MS);
  };
  play(0);
});

// --- what the server sends ---------------------------------------------------------------------------------------------

async function* serverEvents(body) {
  let waiting = "";
  for await (const text of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (waiting + text).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ([^]*)/)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

// Streams are not iterable in every browser yet.
async function* chunks(stream) {
  const reader = stream.getReader();
  const read = () => reader.read().catch((error) => {
    throw running.signal.aborted ? error : new Refused(CUT_OFF, { passing: true });
  });
  for (let part = await read(); !part.done; part = await read()) yield part.value;
}

class Refused extends Error {
  constructor(message, { status = 0, retryAfterS = 0, passing = false } = {}) {
    super(message);
    Object.assign(this, { status, retryAfterS, passing }); // passing: the same may be answered later
  }
}

async function refusal(reply) {
  const body = await reply.json().catch(() => null); // a proxy's own page
  const message = body?.error?.message ?? `The server answered ${reply.status} ${reply.statusText}`;
  const passing = reply.status === 429 || reply.status >= 500;
  return new Refused(message, { status: reply.status, retryAfterS: Number(reply.headers.get("Retry-After")), passing });
}

const RECEIVE = {
  depth: (event) => {
    showDepth(event.depth_image);
    tellState("reading the question …");
  },
  step: ({ index, ...step }) => {
    const isNew = index === steps.length;
    if (isNew && index) tellStep(index - 1);
    putStep(index, step);
    if (isNew) markWriting(index);
    if (isNew && following) select(index);
    tellState(`look ${index + 1} …`);
  },
  answer: (event) => {
    markWriting(-1);
    tellAnswer(event.text);
    tellState("answering …");
  },
  reply: showReply,
  error: (event) => {
    throw new Refused(event.error.message, { passing: event.error.type === "server_error" });
  },
};

function markWriting(index) {
  [...find("steps").children].forEach((item, place) => item.classList.toggle("writing", place === index));
}

function tellAnswer(words, kind = "") {
  find("answer").textContent = words;
  find("answer").className = kind;
}

function tellState(words, kind = "") {
  find("state").textContent = words;
  find("state").className = kind;
}

function showReply(reply) {
  const told = steps;
  if (told.length) tellStep(told.length - 1);
  // Of an output that is no trace the reply has no texts: what was shown for the same boxes stays.
  const same = (step, index) => JSON.stringify(told[index]?.boxes) === JSON.stringify(step.boxes);
  steps = reply.steps.map((step, index) => (reply.valid || !same(step, index) ? step : told[index]));
  while (find("steps").children.length > steps.length) find("steps").lastChild.remove();
  steps.forEach((step, index) => putStep(index, step));
  if (selected in steps) show(selected);
  else if (steps.length) select(steps.length - 1);
  markWriting(-1);

  if (reply.answer === null) tellAnswer("No answer was written", "none");
  else tellAnswer(reply.answer);
  announce(reply.answer === null ? "No answer was written." : `Answer: ${reply.answer}`);
  if (reply.valid) tellState("✓ well-formed trace", "good");
  else tellState("✗ not a well-formed trace", "bad");
  find("reasons").replaceChildren(
    ...reply.reasons.map((reason) => element("li", { textContent: settings.explanations[reason] })),
  );
  find("replay").hidden = steps.length < 2;
  find("empty").textContent = steps.length ? "" : "The model looked nowhere.";
  find("raw").textContent = reply.text;
  find("raw-part").hidden = false;
  const { depth: depthS, generate: generateS } = reply.seconds;
  find("print").textContent =
    `policy version ${reply.policy_version} · depth after ${depthS.toFixed(2)} s · written in ${generateS.toFixed(2)} s`;
}

// --- asking ------------------------------------------------------------------------------------------------------------

let picture = null; // {blob, url, ratio}: width over height
let running = null; // AbortController of the request under way
let asked = Promise.resolve(); // settled when no request is under way

async function ask() {
  if (running) return asked;
  tellProblem(null);
  const question = find("question").value.trim();
  if (!picture) return tellProblem(new Refused("Choose a picture first."), find("file"));
  if (!question) return tellProblem(new Refused("Write a question first."), find("question"));
  const key = find("key").value.trim();
  if (/[^!-~]/.test(key)) return tellProblem(new Refused("The API key has a character that no key has."), find("key"));
  sessionStorage.setItem("key", key);
  running = new AbortController();
  let last = ""; // name of the last event
  begin(question);
  try {
    const body = new FormData();
    body.append("image", picture.blob, "picture");
    body.append("question", question);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const sent = { method: "POST", body, headers, signal: running.signal };
    const reply = await fetch("v1/sif?stream=1", sent).catch((error) => {
      throw running.signal.aborted ? error : new Refused(UNREACHABLE, { passing: true });
    });
    if (!reply.ok) throw await refusal(reply);
    for await (const [name, event] of serverEvents(reply.body)) {
      RECEIVE[name](event);
      last = name;
    }
    if (last !== "reply") throw new Refused(CUT_OFF, { passing: true });
  } catch (error) {
    if (running.signal.aborted) {
      tellState("stopped");
      announce("Stopped.");
    } else {
      tellState("failed", "bad");
      find("reply").hidden = !last;
      if (!(error instanceof Refused)) console.error(error);
      tellProblem(error);
    }
    if (find("answer").className) tellAnswer("");
    depth.figure.querySelector(".wait").textContent = "no depth map";
  } finally {
    running = null;
    markWriting(-1);
    if (document.activeElement === find("stop")) find("ask").focus();
    find("stop").hidden = true;
    find("ask").removeAttribute("aria-disabled");
  }
}

function begin(question) {
  stopReplay();
  steps = [];
  selected = -1;
  following = true;
  for (const view of [photo, depth]) view.focus([]);
  for (const id of ["steps", "reasons", "news", "marks"]) find(id).replaceChildren();
  for (const id of ["print", "empty", "pointed"]) find(id).textContent = "";
  for (const id of ["replay", "raw-part", "scale"]) find(id).hidden = true;
  find("raw-part").open = false;
  tellAnswer("…", "none");
  find("asked").textContent = question;
  photo.image.src = picture.url;
  photo.image.alt = "Photo";
  depth.image.hidden = true;
  depth.frame.style.setProperty("--ratio", picture.ratio);
  depth.figure.querySelector(".wait").textContent = "estimating depth …";
  depth.figure.querySelector(".wait").hidden = false;
  find("reply").hidden = false;
  find("stop").hidden = false;
  find("ask").ariaDisabled = "true";
  tellState("estimating depth …");
  if (find("reply").getBoundingClientRect().bottom > innerHeight) find("reply").scrollIntoView();
}

let countdown = 0;

function tellProblem(error, cause = null) {
  clearInterval(countdown);
  find("problem").hidden = !error;
  if (!error) return;
  const keyWords = find("key").value ? "This server does not know the API key" : "This server answers only with an API key";
  const words = [error.status === 401 ? keyWords : error.message.replace(/\.$/, "")];
  if (error.retryAfterS) words.push(`The server asks to wait ${error.retryAfterS} s`);
  find("problem-words").textContent = words.map((sentence) => `${sentence}.`).join(" ");
  find("again").hidden = !error.passing;
  let waitS = error.retryAfterS;
  const count = () => {
    find("again").disabled = waitS > 0;
    find("again").textContent = waitS > 0 ? `Ask again in ${waitS} s` : "Ask again";
    if (waitS-- <= 0) clearInterval(countdown);
  };
  countdown = setInterval(count, 1000);
  count();
  find("problem").scrollIntoView({ block: "nearest" });
  if (error.status === 401) {
    find("key-part").open = true;
    find("key").focus({ preventScroll: true });
  }
  cause?.focus({ preventScroll: true });
}

async function take(blob) {
  tellProblem(null);
  if (picture) URL.revokeObjectURL(picture.url);
  picture = null;
  try {
    if (!TYPES.includes(blob.type)) throw new Refused(`This is no PNG, JPEG or WebP picture: ${blob.name}`);
    if (blob.size > settings.max_image_bytes) {
      const [size, most] = [blob.size, settings.max_image_bytes].map((bytes) => (bytes / 1e6).toFixed(1));
      throw new Refused(`The picture has ${size} MB; the server takes up to ${most} MB.`);
    }
    const url = URL.createObjectURL(blob);
    const image = find("preview");
    image.src = url;
    await image.decode().catch(() => {
      throw new Refused("The picture cannot be decoded; it may be damaged.");
    });
    image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= TINY_PX);
    picture = { blob, url, ratio: image.naturalWidth / image.naturalHeight };
    find("drop-words").replaceChildren(element("b", { textContent: "Another picture" }), blob.name ?? "");
    image.hidden = false;
    find("drop").classList.add("taken");
  } catch (error) {
    find("preview").hidden = true;
    find("drop").classList.remove("taken");
    find("drop-words").replaceChildren(element("b", { textContent: "Choose a picture" }), "or drop or paste one");
    tellProblem(error, find("file"));
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  asked = ask();
});
find("again").addEventListener("click", () => (asked = ask()));
find("stop").addEventListener("click", () => running.abort());
find("file").addEventListener("change", async () => {
  if (!find("file").files.length) return;
  await take(find("file").files[0]);
  if (picture) find("question").focus();
});
find("file").addEventListener("click", () => (find("file").value = "")); // the same file again is a change too
find("question").maxLength = settings.max_question_chars;
find("key").value = sessionStorage.getItem("key") ?? "";

for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", async () => {
    running?.abort();
    await asked;
    const image = button.querySelector("img");
    const reply = await fetch(image.src).catch(() => null);
    if (!reply?.ok) return tellProblem(new Refused(UNREACHABLE));
    await take(await reply.blob());
    find("question").value = button.querySelector("span").textContent;
    asked = ask();
  });
}

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
});
for (const [kind, dragged] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragged", dragged);
  });
}
document.addEventListener("drop", (event) => {
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
