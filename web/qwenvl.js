// What the page does more for these nodes. Values of saved workflows find their widgets: carry_over.js.
//
// Shows the last answer on its node again after the page is reloaded or another workflow was open: the page itself shows
// it while it is made, and then only until then. The text is in the server's history, as the node's ui output.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { carryOver, nameValues } from "./carry_over.js";

const NODES = new Set(["QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL"]);
// The page's own widget for live text. It uses whatever has this name, so that there is never a second one.
const WIDGET = "$$node-text-preview";
const LOOKED_THROUGH = 20;

function show(node, texts) {
  let widget = node.widgets?.find(({ name }) => name === WIDGET);
  if (!widget) {
    const area = document.createElement("textarea");
    area.readOnly = true;
    area.className = "comfy-multiline-input";
    widget = node.addDOMWidget(WIDGET, "answer", area, {
      serialize: false,
      getValue: () => area.value,
      setValue: (value) => (area.value = value),
    });
    // Saved workflows are read by position: this is no value of theirs.
    widget.serialize = false;
  }
  widget.value = texts.join("\n\n");
}

async function showFromHistory() {
  const nodes = app.graph.nodes.filter(({ type }) => NODES.has(type));
  if (!nodes.length) return;
  const response = await api.fetchApi(`/history?max_items=${LOOKED_THROUGH}`);
  const runs = Object.values(await response.json()).sort((a, b) => b.prompt[0] - a.prompt[0]);
  const ours = runs.filter(({ prompt }) => prompt[3]?.extra_pnginfo?.workflow?.id === app.graph.id);
  for (const node of nodes) {
    const texts = ours.map(({ outputs }) => outputs[node.id]?.text).find(Boolean);
    if (texts) show(node, texts);
  }
}

/** The widgets whose values are saved, in the order in which they are. */
function saved(node) {
  return (node.widgets ?? []).filter(({ serialize }) => serialize !== false).map(({ name, value }) => ({ name, value }));
}

app.registerExtension({
  name: "QwenVL",
  beforeRegisterNodeDef(nodeType, { name }) {
    if (!NODES.has(name)) return;
    const { configure, onSerialize, onExecuted } = nodeType.prototype;
    nodeType.prototype.configure = function (info) {
      carryOver(info, saved(this), this.inputs.map((input) => input.name));
      return configure.apply(this, arguments);
    };
    nodeType.prototype.onSerialize = function (info) {
      onSerialize?.apply(this, arguments);
      nameValues(info, saved(this));
    };
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) show(this, output.text);
    };
  },
  afterConfigureGraph: showFromHistory,
});
