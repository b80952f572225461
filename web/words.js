// Translates the words of these scripts to the page's language: word("Copy"). The English text is the key. words.json
// holds all translations; `python3 tests/texts` builds it from locales/<language>/texts.json, and finds the English
// texts in these files, so every call of word() must hold one plain string.

import { app } from "../../scripts/app.js";

async function load() {
  try {
    const response = await fetch(new URL("words.json", import.meta.url), { cache: "no-cache" });
    return response.ok ? await response.json() : {};
  } catch {
    return {}; // fall back to English
  }
}

const TABLE = await load();

function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** Return true if there are translations for the page's language. */
export function isTranslated() {
  return language() in TABLE;
}

/** Translate a choice, a title or a paragraph of the nodes and templates. */
export function meaning(text) {
  return TABLE[language()]?.[text] ?? text;
}

/** @param values replacements for {names} in the text. @returns the English text if it has no translation. */
export function word(english, values = {}) {
  const [first, ...parts] = meaning(english).split("{");
  return parts.reduce((text, part) => text + filled(part, values), first);
}

/** @param part what follows a brace. */
function filled(part, values) {
  const end = part.indexOf("}");
  const name = part.slice(0, Math.max(end, 0));
  return name in values ? values[name] + part.slice(end + 1) : `{${part}`;
}
