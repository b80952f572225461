// What the page does more for these nodes, each thing in a file of its own: values of saved workflows find their widgets
// (carry_over.js), settings that are seldom needed are folded away (fold.js), and the answer is shown on the node
// (answer.js), again after a reload: it is in the server's history, as the node's ui output.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { showAnswers, showProgress } from "./answer.js";
import { carryOver, nameValues } from "./carry_over.js";
import { addFold } from "./fold.js";

const NODES = new Set(["QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL"]);
const LOOKED_THROUGH = 20;

/** The widgets whose values are saved, in the order in which they are. */
function saved(node) {
  return (node.widgets ?? []).filter(({ serialize }) => serialize !== false).map(({ name, value }) => ({ name, value }));
}

/** Every node of ours with the id that it runs under: those of a subgraph begin with the subgraph's. */
function* ours(graph, prefix = "") {
  for (const node of graph?.nodes ?? []) {
    if (NODES.has(node.type)) yield [`${prefix}${node.id}`, node];
    if (node.subgraph) yield* ours(node.subgraph, `${prefix}${node.id}:`);
  }
}

function wholeGraph() {
  return app.rootGraph ?? app.graph.rootGraph ?? app.graph;
}

async function showFromHistory() {
  const nodes = [...ours(wholeGraph())];
  if (!nodes.length) return;
  const response = await api.fetchApi(`/history?max_items=${LOOKED_THROUGH}`);
  const runs = Object.values(await response.json()).sort((a, b) => b.prompt[0] - a.prompt[0]);
  const mine = runs.filter(({ prompt }) => prompt[3]?.extra_pnginfo?.workflow?.id === wholeGraph().id);
  for (const [id, node] of nodes) {
    const answer = mine.map(({ outputs }) => outputs[id]).find((output) => output?.text);
    if (answer) showAnswers(node, answer);
  }
}

api.addEventListener("qwenvl.progress", ({ detail }) => {
  const [, node] = [...ours(wholeGraph())].find(([id]) => id === detail.node) ?? [];
  if (node) showProgress(node, detail);
});

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
      if (output?.text) showAnswers(this, output);
    };
  },
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    addFold(node, Boolean(app.extensionManager?.setting?.get("Comfy.Node.AlwaysShowAdvancedWidgets")));
  },
  afterConfigureGraph: showFromHistory,
});
