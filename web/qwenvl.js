// The pack's extension of ComfyUI's page: assigns the values of saved workflows to widgets (carry_over.js), folds rare
// settings (fold.js), sets the first values of new nodes (first_values.js), and shows every node's state and answer
// (states.js: what and in which workflow; answer.js: how).

import { app } from "../../scripts/app.js";
import { show } from "./answer.js";
import { carryOver, nameValues } from "./carry_over.js";
import { declare, firstValues } from "./first_values.js";
import { addFold } from "./fold.js";
import { beforeQueued, keep, SETTINGS } from "./settings.js";
import { NODES, watch } from "./states.js";

/** List the widgets whose values are saved, in saving order. */
function saved(node) {
  return (node.widgets ?? []).filter(({ serialize }) => serialize !== false).map(({ name, value }) => ({ name, value }));
}

watch((node, state) => show(node, state, !NODES.has(node.type)), beforeQueued);

app.registerExtension({
  name: "QwenVL",
  settings: SETTINGS,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    declare(nodeData);
    const { configure, onSerialize } = nodeType.prototype;
    nodeType.prototype.configure = function (info) {
      carryOver(info, saved(this), this.inputs.map((input) => input.name));
      return configure.apply(this, arguments);
    };
    nodeType.prototype.onSerialize = function (info) {
      onSerialize?.apply(this, arguments);
      nameValues(info, saved(this));
      keep(this, info);
    };
  },
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    firstValues(node);
    addFold(node, Boolean(app.extensionManager?.setting?.get("Comfy.Node.AlwaysShowAdvancedWidgets")));
  },
});
