// The answer box on a node: a line with the node's state and speed, the model's thinking (folded), the answer or the
// error, and a copy button.

import { addStyle, element } from "./element.js";
import { size } from "./model_choices.js";
import { word } from "./words.js";

const WIDGET = "qwenvl_answer";
// Height in pixels of the answer with its line above it.
const HEIGHT = 200;
const SMALL_HEIGHT = 84;
const THOUGHT_HEIGHT = 24;
// The most characters that are shown; the copy button copies the whole text.
const LONGEST_SHOWN = 100_000;
const COPIED_MS = 1500;

const STYLE = `
.qwenvl-answer { display: flex; flex-direction: column; gap: 4px; overflow: hidden; box-sizing: border-box;
  width: 100%; height: 100%; font-size: 12px; color: var(--input-text); background: var(--comfy-input-bg);
  border-radius: 4px; padding: 4px 6px; border: 1px solid transparent; }
.qwenvl-answer header { display: flex; align-items: center; justify-content: space-between; gap: 8px; min-height: 18px;
  color: var(--descrip-text); font-size: 11px; flex: none; }
.qwenvl-answer .status { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.qwenvl-answer button { border: 1px solid var(--border-color); border-radius: 3px; background: transparent;
  color: inherit; font-size: 11px; padding: 0 6px; cursor: pointer; flex: none; }
.qwenvl-answer details { flex: none; color: var(--descrip-text); }
.qwenvl-answer details[open] { max-height: 60%; overflow: auto; }
.qwenvl-answer summary { cursor: pointer; }
.qwenvl-answer .text, .qwenvl-answer .thinking { white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; }
.qwenvl-answer .text { flex: 1 1 auto; min-height: 0; overflow: auto; }
.qwenvl-answer .rest { flex: none; color: var(--descrip-text); font-size: 11px; }
.qwenvl-answer[data-state="error"] { border-color: #d33a2f; }
/* Own colours, since those of some page palettes are too pale. */
.qwenvl-answer[data-state="error"] .status { background: #b3261e; color: #fff; border-radius: 3px; padding: 0 6px; }
.qwenvl-answer[data-state="cancelled"] .text { color: var(--descrip-text); }
/* Nodes drawn as HTML grow with their content, and their widgets have another colour. */
[data-node-id] .qwenvl-answer { height: auto; min-height: ${HEIGHT}px;
  background: var(--component-node-widget-background, var(--comfy-input-bg)); }
[data-node-id] .qwenvl-answer.small { min-height: 0; }
[data-node-id] .qwenvl-answer .text { max-height: 400px; }
`;

async function copy(text) {
  // Over plain http from another machine, browsers offer no clipboard API to pages, only execCommand.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function counted({ done, unit, total }) {
  if (unit === "answers") {
    if (total != null) return word("{n} of {total} answers", { n: done, total });
    return done === 1 ? word("1 answer") : word("{n} answers", { n: done });
  }
  return done === 1 ? word("1 token") : word("{n} tokens", { n: done });
}

function speed({ unit, per_s: perSecond }) {
  const n = perSecond?.toFixed(1);
  return unit === "answers" ? word("{n} answers/s", { n }) : word("{n} tokens/s", { n });
}

function time(seconds) {
  const rounded = Math.round(seconds);
  return rounded > 90 ? word("{n} min left", { n: Math.round(rounded / 60) }) : word("{n} s left", { n: rounded });
}

function download({ state, done, total, per_s: perSecond }) {
  const amounts = { n: size(done), total: size(total) };
  const amount = state === "checking" ? word("Checking {n} of {total}", amounts) : word("Downloading {n} of {total}", amounts);
  if (!perSecond) return [amount];
  // A slow line would look like 1 MB/s.
  const rate = perSecond < 1e6 ? `${Math.ceil(perSecond / 1e3)} KB/s` : `${size(perSecond)}/s`;
  return [amount, rate, time((total - done) / perSecond)];
}

function reading({ pictures: asked, videos, unit, total }) {
  const pictures = unit === "pictures" ? total : asked; // of a folder they are counted
  if (videos) return word("Reading the video");
  if (!pictures) return word("Reading the question");
  return pictures === 1 ? word("Reading 1 picture") : word("Reading {n} pictures", { n: pictures });
}

const DOING = {
  starting: () => [word("Starting")],
  checking: download,
  downloading: download,
  loading: ({ model, size: bytes }) => [word("Loading {model}", { model }), size(bytes)],
  reading: (state) => [reading(state)],
  asking: ({ model }) => [word("Waiting for {model}", { model })],
  thinking: (state) => [word("Thinking"), ...progress(state)],
  answering: (state) => [word("Answering"), ...progress(state)],
  // The server's last count has a total too.
  done: (state) => progress({ ...state, total: null }),
  cancelled: (state) =>
    isCounted(state) ? [word("Cancelled after {amount}", { amount: counted(state) })] : [word("Cancelled")],
  error: () => [word("Error")],
};

function isCounted({ done, unit }) {
  return done != null && (unit === "tokens" || unit === "answers");
}

function progress(state) {
  if (!isCounted(state)) return [];
  return state.per_s == null ? [counted(state)] : [counted(state), speed(state)];
}

function build(isSmall) {
  const status = element("span", { className: "status" });
  const button = element("button", { textContent: word("Copy"), title: word("Copy the answer") });
  const thought = element("div", { className: "thinking" });
  const folded = element("details", { hidden: true }, element("summary", { textContent: word("Thinking") }), thought);
  const text = element("div", { className: "text" });
  const rest = element("div", { className: "rest", hidden: true });
  const area = element("div", { className: `qwenvl-answer${isSmall ? " small" : ""}` });
  area.append(element("header", {}, status, button), folded, text, rest);
  return { area, status, button, thought, folded, text, rest };
}

/** Show the text, cut if it is too long; while it is being written, keep its end in view. */
function fill({ text, rest }, whole, isGrowing) {
  const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 20;
  if (whole === text.qwenvlText) return;
  text.qwenvlText = whole;
  text.textContent = whole.length > LONGEST_SHOWN ? whole.slice(0, LONGEST_SHOWN) : whole;
  rest.hidden = whole.length <= LONGEST_SHOWN;
  rest.textContent = rest.hidden ? "" : word("{n} more characters: copy to have them", { n: whole.length - LONGEST_SHOWN });
  if (isGrowing && atEnd) text.scrollTop = text.scrollHeight;
}

function addWidget(node, isSmall) {
  addStyle("qwenvl-answer-style", STYLE);
  const built = build(isSmall);
  const { area, status, button, thought, folded, text } = built;
  let whole = "";
  const options = {
    serialize: false,
    // Otherwise the panel beside the workflow would take the box away from the node.
    hideInPanel: true,
    getValue: () => whole,
    setValue: () => {}, // only this file sets it
    getMinHeight: () => (isSmall ? SMALL_HEIGHT : HEIGHT + (folded.hidden ? 0 : THOUGHT_HEIGHT)),
  };
  const widget = node.addDOMWidget(WIDGET, "answer", area, options);
  // Workflows save widget values by position, and this widget must not take one.
  widget.serialize = false;
  widget.label = word("Answer");
  folded.ontoggle = () => node.setDirtyCanvas(true, true);
  button.onclick = async () => {
    await copy(whole);
    button.textContent = word("Copied");
    setTimeout(() => (button.textContent = word("Copy")), COPIED_MS);
  };
  widget.show = (state) => {
    whole = state.text ?? "";
    const isGrowing = state.state === "answering";
    area.dataset.state = state.state;
    status.textContent = status.title = DOING[state.state]?.(state).join(" · ") ?? "";
    button.hidden = !whole;
    thought.textContent = (state.thinking ?? "").slice(0, LONGEST_SHOWN);
    folded.hidden = !state.thinking;
    fill(built, whole, isGrowing);
    if (!isGrowing && state.state === "done" && widget.wasGrowing) text.scrollTop = 0;
    widget.wasGrowing = isGrowing;
    node.setDirtyCanvas(true, true);
  };
  grow(node);
  return widget;
}

/** Make room for the answer, once; the other widgets keep their height. */
function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
}

/** @param isSmall true for nodes that show a line or two. */
export function show(node, state, isSmall) {
  const widget = node.widgets?.find(({ name }) => name === WIDGET) ?? addWidget(node, isSmall);
  widget.show(state);
}
