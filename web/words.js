// The words of these scripts in the page's language: word("Copy"). The English is the key. The translations of every
// language are in words.json, which `python3 tests/texts` makes of locales/<language>/texts.json; it finds the words
// themselves in these files, so each stands in the call as one plain string.

import { app } from "../../scripts/app.js";

async function load() {
  try {
    const response = await fetch(new URL("words.json", import.meta.url), { cache: "no-cache" });
    return response.ok ? await response.json() : {};
  } catch {
    return {}; // English will do
  }
}

const TABLE = await load();

function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** Whether the page's language is one that there are words of. */
export function isTranslated() {
  return language() in TABLE;
}

/** A choice, a title or a paragraph, which the nodes and templates say and not these scripts. */
export function meaning(text) {
  return TABLE[language()]?.[text] ?? text;
}

/** @param values what stands for {names} in it. @returns the English where there is no translation. */
export function word(english, values = {}) {
  return meaning(english).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
