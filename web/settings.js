// The pack's settings, under ComfyUI's Settings > QwenVL.

import { app } from "../../scripts/app.js";
import { isMissing, mark, refreshChoices } from "./model_choices.js";
import { showSidebar } from "./models.js";
import { NODES, stateOfNode } from "./states.js";
import { word } from "./words.js";

const MODEL = "QwenVL.Model";
const DOWNLOADS = "QwenVL.Downloads";
const KEEP = "QwenVL.KeepAnswers";
const SIDEBAR = "QwenVL.Sidebar";
// The most characters of an answer that are saved in a workflow's file.
const LONGEST_KEPT = 100_000;
// No model has this name. Pages show nothing for an empty value.
const NONE_CHOSEN = "*";

const models = new Set();

function get(id) {
  return app.extensionManager?.setting?.get(id);
}

function listed() {
  const known = [...models].map((name) => ({ text: name, value: name }));
  return [{ text: word("the first of the list"), value: NONE_CHOSEN }, ...known];
}

function setting(id, name, tooltip, more) {
  return { id, category: ["QwenVL", "QwenVL", id.split(".")[1]], name, tooltip, ...more };
}

export const SETTINGS = [
  setting(SIDEBAR, word("Show the models in memory in the sidebar"), undefined, {
    type: "boolean",
    defaultValue: true,
    onChange: (isWanted) => showSidebar(isWanted !== false),
  }),
  setting(
    KEEP,
    word("Keep answers in the workflow's file"),
    word("They are on the nodes again after a restart of the server. Whoever is given the file can read them."),
    { type: "boolean", defaultValue: false },
  ),
  setting(
    DOWNLOADS,
    word("Downloads"),
    word("Before a prompt is queued: whether models that are not on the server's disk may be downloaded."),
    {
      type: "combo",
      defaultValue: "auto",
      options: () => [
        { text: word("as each node is set"), value: "auto" },
        { text: word("ask"), value: "ask" },
        { text: word("never"), value: "never" },
      ],
    },
  ),
  setting(MODEL, word("Model of new nodes"), undefined, { type: "combo", defaultValue: NONE_CHOSEN, options: listed }),
];

/** Add models that a node offers to the choices of the setting "Model of new nodes". */
export function offer(names) {
  for (const name of names) models.add(name);
}

export function preferredModel() {
  return get(MODEL);
}

/** Add a node's answer to its saved data if the user has set that. */
export function keep(node, info) {
  delete info.qwenvl_answer;
  delete info.extensions?.qwenvl_answer; // where pages from 1.58 on keep what a node was loaded with
  if (!get(KEEP)) return;
  const { state, text, thinking } = stateOfNode(node) ?? node.qwenvl_answer ?? {};
  if (state === "done" && text?.length <= LONGEST_KEPT) info.qwenvl_answer = { state, text, thinking };
}

/** Return true if no wanted model has to be downloaded, or if the user agrees to the download. */
async function mayFetch(wanted) {
  await refreshChoices();
  const missing = wanted.filter(isMissing);
  if (!missing.length) return true;
  const message = word("These models are not on the server's disk. Download them?");
  const itemList = missing.map((name) => `${name}: ${mark(name).text}`);
  const { dialog } = app.extensionManager;
  if (!dialog?.confirm) return window.confirm([message, ...itemList].join("\n"));
  return Boolean(await dialog.confirm({ title: "QwenVL", message, itemList }));
}

/** @param prompt the prompt about to be queued; download is set to never in nodes that may not download. */
export async function beforeQueued(prompt) {
  const policy = get(DOWNLOADS);
  if (policy !== "ask" && policy !== "never") return;
  const asking = Object.values(prompt).filter(({ class_type: type, inputs }) => NODES.has(type) && inputs.download !== "never");
  const wanted = [...new Set(asking.map(({ inputs }) => inputs.model).filter((name) => typeof name === "string"))];
  if (policy === "ask" && (!wanted.length || (await mayFetch(wanted)))) return;
  for (const { inputs } of asking) inputs.download = "never";
}
