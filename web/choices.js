// Translates the choices of lists that are words. Their values stay as they are, so workflows do not change. Pages
// without labels for values show the values.

import { app } from "../../scripts/app.js";
import { isTranslated, meaning } from "./words.js";

const NODES = new Set();
// Names of models are not translated.
const AS_THEY_ARE = new Set(["model", "control_after_generate"]);

const label = (value) => (value == null ? "" : meaning(String(value)));

app.registerExtension({
  name: "QwenVL.choices",
  beforeRegisterNodeDef(nodeType, { name, category }) {
    if (category === "QwenVL") NODES.add(name);
  },
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    for (const { type, name, options } of node.widgets ?? []) {
      if (type !== "combo" || AS_THEY_ARE.has(name) || !options) continue;
      Object.defineProperty(options, "getOptionLabel", {
        configurable: true,
        enumerable: true,
        get: () => (isTranslated() ? label : undefined),
      });
    }
  },
});
