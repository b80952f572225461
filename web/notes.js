// Translates templates: notes by paragraphs, and titles of nodes and groups. Only if one of the pack's notes is found
// unchanged; what a user has changed stays.

import { app } from "../../scripts/app.js";
import { isTranslated, meaning } from "./words.js";

/** Translate a paragraph, a heading or a title. */
function translated(text) {
  const begin = text.slice(0, 3);
  // A heading, or a title that begins with its number in the order of steps.
  const isMarked = begin === "## " || (begin[0] >= "0" && begin[0] <= "9" && begin.slice(1) === "  ");
  return isMarked ? begin + meaning(text.slice(3)) : meaning(text);
}

function translate(graph) {
  const notes = graph.nodes.filter(({ type }) => type === "MarkdownNote").map((node) => node.widgets?.[0]);
  const texts = notes.map((widget) => String(widget?.value ?? ""));
  const meanings = texts.map((text) => text.split("\n\n").map(translated).join("\n\n"));
  if (meanings.every((text, place) => text === texts[place])) return;
  notes.forEach((widget, place) => widget && (widget.value = meanings[place]));
  for (const node of graph.nodes) if (node.title) node.title = translated(node.title);
  for (const group of graph.groups ?? []) group.title = translated(group.title);
}

app.registerExtension({
  name: "QwenVL.notes",
  afterConfigureGraph() {
    if (isTranslated()) translate(app.rootGraph ?? app.graph);
  },
});
