// The first values of a new node. A node of a saved workflow gets its saved values after this.

import { offer, preferredModel } from "./settings.js";
import { word } from "./words.js";

const CONTROL = "control_after_generate";

/** Change a node's definition before the page creates nodes of it: the question becomes the first text to fill in. */
export function declare(nodeData) {
  const { input } = nodeData;
  // The node shows its answer itself, and the server runs it without a preview behind it.
  nodeData.output_node = true;
  const { system, text, prompt, model } = input?.required ?? {};
  offer(Array.isArray(model?.[0]) ? model[0] : (model?.[1]?.options ?? []));
  const question = text ?? prompt;
  if (system?.[1]) Object.assign(system[1], { advanced: true, placeholder: word("System prompt: who the model is") });
  if (question?.[1]) question[1].placeholder = word("Your question, such as: Describe this image.");
}

export function firstValues(node) {
  const widget = (name) => node.widgets?.find((candidate) => candidate.name === name);
  // Any other choice would replace -1, which draws a new seed on every run.
  const control = widget(CONTROL);
  if (control) control.value = "fixed";
  const model = widget("model");
  const preferred = preferredModel();
  if (model && preferred && model.options?.values?.includes?.(preferred)) model.value = preferred;
}
