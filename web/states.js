// What every node of this pack shows: its state, its answer or its error. Kept for each workflow, so that it is shown
// again when the user returns to the workflow, undoes something, or reloads the page.

import { api } from "../../scripts/api.js";
import { isInSight, overReloads, placeAt, placeInSight, placeOf, wholeGraph, written } from "./runs.js";
import { watchQueue, watchWorkflows, whenQueued } from "./runs.js";

const ANSWERING = ["QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL"];
const TELLING = ["QwenVLBoxes", "QwenVLLoadFolder", "QwenVLSaveCaptions"];
const FINAL = new Set(["done", "cancelled", "error"]);
const WORKFLOWS_KEPT = 30;
// The most characters of a text that are kept over a reload of the page.
const LONGEST_KEPT = 20_000;
const LOOKED_THROUGH = 20;

/** The nodes that answer questions. */
export const NODES = new Set(ANSWERING);
const OURS = new Set([...ANSWERING, ...TELLING]);

// Workflow -> execution id of a node -> what it shows.
const kept = new Map();
let order = 0;
// True once the visible workflow has all its nodes and its tab is the open one.
let isSettled = false;
let show = () => {};

/** Yield every node of this pack with its execution id, which begins with the ids of the subgraphs around it. */
export function* ours(graph = wholeGraph(), prefix = "") {
  for (const node of graph?.nodes ?? []) {
    if (OURS.has(node.type)) yield [`${prefix}${node.id}`, node];
    if (node.subgraph) yield* ours(node.subgraph, `${prefix}${node.id}:`);
  }
}

function nodeAt(id) {
  return [...ours()].find(([known]) => known === String(id))?.[1];
}

function put(place, id, prompt, change) {
  if (!place) return;
  const nodes = kept.get(place) ?? new Map();
  kept.set(place, nodes);
  if (kept.size > WORKFLOWS_KEPT) kept.delete(kept.keys().next().value);
  const before = nodes.get(id);
  const state = { ...(before?.prompt === prompt ? before : {}), ...change, prompt, order: ++order };
  nodes.set(id, state);
  const node = isSettled && isInSight(place) && nodeAt(id);
  if (node) show(node, state);
}

/** Return the newest state of a node, from its tab or from prompts that other pages queued from the same workflow. */
function stateOf(id) {
  const known = [placeInSight(), wholeGraph().id].map((place) => kept.get(place)?.get(id)).filter(Boolean);
  return known.sort((a, b) => b.order - a.order)[0];
}

export function stateOfNode(node) {
  const [id] = [...ours()].find(([, candidate]) => candidate === node) ?? [];
  return id === undefined ? undefined : stateOf(id);
}

function joined(texts) {
  return (texts ?? []).filter(Boolean).join("\n\n");
}

function answerOf(output) {
  return { state: "done", text: output.text.join("\n\n"), thinking: joined(output.thinking) };
}

function figures({ done, unit, per_s: perSecond }) {
  return { done, unit, per_s: perSecond };
}

const HEARD = {
  "qwenvl.progress": ({ node, prompt_id: prompt, workflow, ...state }) =>
    put(placeOf(prompt, workflow), node, prompt, { workflow, ...state }),
  executed({ node, prompt_id: prompt, output }) {
    const place = placeOf(prompt, workflowOf(prompt));
    if (!output?.text || !place) return;
    const before = kept.get(place)?.get(node);
    // A node without progress so far may belong to another pack.
    if (!before && !(isInSight(place) && nodeAt(node))) return;
    const answer = answerOf(output);
    // The same answer from ComfyUI's cache keeps its old figures.
    const same = before && before.prompt !== prompt && before.text === answer.text;
    put(place, node, prompt, same ? { ...figures(before), ...answer } : answer);
  },
  execution_interrupted({ node_id: node, prompt_id: prompt, node_type: type }) {
    if (OURS.has(type)) put(placeOf(prompt, workflowOf(prompt)), node, prompt, { state: "cancelled" });
  },
  execution_error({ node_id: node, prompt_id: prompt, node_type: type, exception_message: message }) {
    if (OURS.has(type)) put(placeOf(prompt, workflowOf(prompt)), node, prompt, failed(message));
  },
};

function failed(message) {
  return { state: "error", text: String(message ?? "").trim(), thinking: "" };
}

function workflowOf(prompt) {
  for (const nodes of kept.values()) {
    for (const state of nodes.values()) if (state.prompt === prompt && state.workflow) return state.workflow;
  }
  return undefined;
}

/** Show ComfyUI's errors for a refused prompt on their nodes; a sentence that comes for several inputs once. */
function showRefused(place, errors) {
  for (const [id, { errors: found = [], class_type: type }] of Object.entries(errors)) {
    if (!OURS.has(type)) continue;
    const sentences = found.map(({ message, details, extra_info: more }) => {
      const name = more?.input_name;
      const detail = String(details ?? "");
      const reason = name && detail.startsWith(`${name} - `) ? detail.slice(name.length + 3) : detail;
      return reason && reason !== name ? reason : [message, detail].filter(Boolean).join(": ");
    });
    put(place, id, `refused ${order}`, failed([...new Set(sentences)].join("\n")));
  }
}

/** Read the outcome for a node from a run of the history; undefined if the run says nothing about it. */
function outcome(id, { outputs, status }) {
  for (const [kind, { node_id: node, exception_message: message }] of status?.messages ?? []) {
    if (String(node) !== id) continue;
    if (kind === "execution_error") return failed(message);
    if (kind === "execution_interrupted") return { state: "cancelled" };
  }
  return outputs?.[id]?.text ? answerOf(outputs[id]) : undefined;
}

const looked = new Set();

/** Look up the outcome of visible nodes in runs whose end this page has missed. */
async function lookThroughHistory() {
  const place = placeInSight();
  const open = [...ours()].filter(([id]) => !FINAL.has(kept.get(place)?.get(id)?.state));
  if (!open.length || looked.has(place)) return;
  looked.add(place);
  const history = await fetched(`/history?max_items=${LOOKED_THROUGH}`);
  const runs = Object.entries(history).sort(([, a], [, b]) => b.prompt[0] - a.prompt[0]);
  const mine = runs.filter(([prompt, run]) => {
    const there = placeOf(prompt, run.prompt[3]?.extra_pnginfo?.workflow?.id);
    return there && (there === place || there === wholeGraph().id);
  });
  for (const [id] of open) {
    const [prompt, found] = mine.map(([prompt, run]) => [prompt, outcome(id, run)]).find(([, state]) => state) ?? [];
    if (found) put(place, id, prompt, found);
  }
  await endWhatIsGone(place);
}

/** Mark as cancelled what seems to run but is in no queue any more: it ended with the server. */
async function endWhatIsGone(place) {
  const going = [...(kept.get(place) ?? [])].filter(([, { state }]) => !FINAL.has(state));
  if (!going.length) return;
  const { queue_running: running = [], queue_pending: pending = [] } = await fetched("/queue");
  const there = new Set([...running, ...pending].map(([, prompt]) => prompt));
  for (const [id, { prompt }] of going) if (!there.has(prompt)) put(place, id, prompt, { state: "cancelled" });
}

async function fetched(path) {
  const response = await api.fetchApi(path);
  return response.ok ? response.json() : {};
}

/** Show the states of the visible workflow on its nodes. */
async function showAll() {
  isSettled = true;
  adopt(placeInSight());
  for (const [id, node] of ours()) {
    const state = stateOf(id) ?? node.qwenvl_answer;
    if (state) show(node, state);
  }
  await lookThroughHistory();
}

/** Move to the tab what was kept under the tab's path from before a reload. */
function adopt(tab) {
  const before = kept.get(tab?.path);
  if (!before) return;
  kept.delete(tab.path);
  kept.set(tab, new Map([...before, ...(kept.get(tab) ?? [])]));
}

function given() {
  const short = ({ text, thinking }) => (text?.length ?? 0) + (thinking?.length ?? 0) <= LONGEST_KEPT;
  return [...kept].flatMap(([place, nodes]) =>
    [...nodes].filter(([, state]) => short(state)).map(([id, state]) => [written(place), id, state]),
  );
}

function taken(all) {
  for (const [path, id, { prompt, ...state }] of all) put(placeAt(path) ?? path, id, prompt, state);
}

/** @param shown called with a node and its new state. @param prepare see watchQueue in runs.js. */
export function watch(shown, prepare) {
  show = shown;
  watchQueue(prepare, showRefused);
  watchWorkflows(() => (isSettled = false), showAll);
  for (const [name, hear] of Object.entries(HEARD)) {
    api.addEventListener(name, async ({ detail }) => {
      await whenQueued();
      hear(detail);
    });
  }
  api.addEventListener("reconnected", () => {
    looked.clear();
    showAll();
  });
  overReloads(given, taken);
}
