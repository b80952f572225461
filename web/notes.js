// The templates in the page's language: notes by paragraphs, and titles of nodes and groups. Only where a note of ours is
// found as it was written: what somebody has changed stays.

import { app } from "../../scripts/app.js";
import { isTranslated, meaning } from "./words.js";

const HEADING = /^(## |\d {2})(.*)$/s;

/** A paragraph, a heading or a title. */
function translated(text) {
  const [, before, rest] = text.match(HEADING) ?? [];
  return before ? before + meaning(rest) : meaning(text);
}

function translate(graph) {
  const notes = graph.nodes.filter(({ type }) => type === "MarkdownNote").map((node) => node.widgets?.[0]);
  const texts = notes.map((widget) => String(widget?.value ?? ""));
  const said = texts.map((text) => text.split("\n\n").map(translated).join("\n\n"));
  if (said.every((each, place) => each === texts[place])) return;
  notes.forEach((widget, place) => widget && (widget.value = said[place]));
  for (const node of graph.nodes) if (node.title) node.title = translated(node.title);
  for (const group of graph.groups ?? []) group.title = translated(group.title);
}

app.registerExtension({
  name: "QwenVL.notes",
  afterConfigureGraph() {
    if (isTranslated()) translate(app.rootGraph ?? app.graph);
  },
});
