// Keeps the last answer on its node. The page shows live text in a widget of its own, but forgets it when it is
// reloaded; so the text is stored with the node, and shown in a widget of that name, which the page then uses too.

import { app } from "../../scripts/app.js";

const NODES = new Set(["QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL"]);
const WIDGET = "$$node-text-preview";
const KEPT = "last_answer";

function show(node, text) {
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
    // Not among the values of a saved workflow, which are read by position.
    widget.serialize = false;
  }
  widget.value = text;
}

app.registerExtension({
  name: "QwenVL.answer",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    const { onExecuted, onConfigure } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (!output?.text) return;
      this.properties[KEPT] = output.text.join("\n\n");
      show(this, this.properties[KEPT]);
    };
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      if (this.properties?.[KEPT]) show(this, this.properties[KEPT]);
    };
  },
});
