// What a new node begins with. A node of a saved workflow takes its own values after this.

import { offer, preferredModel } from "./settings.js";
import { word } from "./words.js";

const CONTROL = "control_after_generate";

/** Change what the page is told of a node before it makes any: the first thing one types into is the question. */
export function declare(nodeData) {
  const { input } = nodeData;
  // The answer is shown here, and the server runs it without a preview behind it.
  nodeData.output_node = true;
  const { system, text, prompt, model } = input?.required ?? {};
  offer(Array.isArray(model?.[0]) ? model[0] : (model?.[1]?.options ?? []));
  const question = text ?? prompt;
  if (system?.[1]) Object.assign(system[1], { advanced: true, placeholder: word("System prompt: who the model is") });
  if (question?.[1]) question[1].placeholder = word("Your question, such as: Describe this image.");
}

export function firstValues(node) {
  const widget = (name) => node.widgets?.find((each) => each.name === name);
  // Anything else would replace -1, a new seed on every run, by a number of its own.
  const control = widget(CONTROL);
  if (control) control.value = "fixed";
  const model = widget("model");
  const preferred = preferredModel();
  if (model && preferred && model.options?.values?.includes?.(preferred)) model.value = preferred;
}
