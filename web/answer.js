// The answer on its node: the text while it is made and afterwards, a button that copies it, how fast it is made, and
// what the model thought, folded. The page has a widget for live text of its own, and uses whatever has its name.

import { addStyle, element } from "./element.js";

const WIDGET = "$$node-text-preview";
// Before what a model thinks, in live text: qwenvl/comfyui/progress.py.
const THINKING = "[thinking] ";

const STYLE = `
.qwenvl-answer { display: flex; flex-direction: column; gap: 4px; overflow: hidden; box-sizing: border-box;
  font-size: 12px; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px; padding: 4px 6px; }
.qwenvl-answer header { display: flex; align-items: center; justify-content: space-between; min-height: 18px;
  color: var(--descrip-text); font-size: 11px; }
.qwenvl-answer button { border: 1px solid var(--border-color); border-radius: 3px; background: transparent;
  color: inherit; font-size: 11px; padding: 0 6px; cursor: pointer; }
.qwenvl-answer details { flex: none; color: var(--descrip-text); }
.qwenvl-answer details[open] { max-height: 60%; overflow: auto; }
.qwenvl-answer summary { cursor: pointer; }
.qwenvl-answer .text, .qwenvl-answer .thinking { white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; }
.qwenvl-answer .text { flex: 1 1 auto; min-height: 3em; overflow: auto; }
/* Where nodes are HTML, they grow with what is in them. */
[data-node-id] .qwenvl-answer .text { max-height: 400px; }
`;

async function copy(text) {
  // Over plain http from another machine the browser has no clipboard for pages, only this old way.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function build() {
  const status = element("span", { className: "status" });
  const button = element("button", { textContent: "Copy", title: "Copy the answer" });
  const thought = element("div", { className: "thinking" });
  const folded = element("details", { hidden: true }, element("summary", { textContent: "Thinking" }), thought);
  const text = element("div", { className: "text" });
  button.onclick = async () => {
    await copy(text.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  const area = element("div", { className: "qwenvl-answer" }, element("header", {}, status, button), folded, text);
  return { area, status, thought, folded, text };
}

function addWidget(node) {
  addStyle("qwenvl-answer-style", STYLE);
  const { area, status, thought, folded, text } = build();
  const widget = node.addDOMWidget(WIDGET, "answer", area, {
    serialize: false,
    getValue: () => text.textContent,
    setValue: (value) => {
      // The thought is shown above it.
      const before = `${THINKING}${thought.textContent}\n\n`;
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 20;
      text.textContent = thought.textContent && value.startsWith(before) ? value.slice(before.length) : value;
      if (atEnd) text.scrollTop = text.scrollHeight;
    },
    getMinHeight: () => (folded.hidden ? 80 : folded.open ? 170 : 100),
  });
  folded.ontoggle = () => node.setDirtyCanvas(true, true);
  // Saved workflows are read by position: this is no value of theirs.
  widget.serialize = false;
  widget.think = (thinking) => {
    thought.textContent = thinking;
    folded.hidden = !thinking;
  };
  widget.tell = (words) => (status.textContent = words);
  return widget;
}

function widgetOf(node) {
  return node.widgets?.find(({ name }) => name === WIDGET) ?? addWidget(node);
}

/** What the server tells of a node that runs: how far it is, how fast, and the thought so far. The text comes after. */
export function showProgress(node, { thinking, done, unit, per_s: perSecond }) {
  const widget = widgetOf(node);
  widget.think?.(thinking);
  const speed = perSecond == null ? "" : ` · ${perSecond.toFixed(1)} ${unit}/s`;
  widget.tell?.(done == null ? "" : `${done} ${unit}${speed}`);
}

/** The final answers, and what was thought before each. */
export function showAnswers(node, { text, thinking }) {
  const widget = widgetOf(node);
  widget.think?.((thinking ?? []).filter(Boolean).join("\n\n"));
  widget.value = text.join("\n\n");
}
