// What every node of ours shows: what it does, its answer, or why there is none. Kept for each workflow, so that it is
// there again when the user comes back to it, undoes something, or loads the page anew.

import { api } from "../../scripts/api.js";
import { isInSight, overReloads, placeAt, placeInSight, placeOf, wholeGraph, written } from "./runs.js";
import { watchQueue, watchWorkflows, whenQueued } from "./runs.js";

const ANSWERING = ["QwenVL", "Qwen", "Qwen2.5VL", "Qwen2.5", "Qwen2VL"];
const TELLING = ["QwenVLBoxes", "QwenVLLoadFolder", "QwenVLSaveCaptions"];
const FINAL = new Set(["done", "cancelled", "error"]);
const WORKFLOWS_KEPT = 30;
// Of a text, while the page is loaded anew.
const LONGEST_KEPT = 20_000;
const LOOKED_THROUGH = 20;

/** The nodes that are asked something. */
export const NODES = new Set(ANSWERING);
const OURS = new Set([...ANSWERING, ...TELLING]);

// Workflow -> id that a node runs under -> what it shows.
const kept = new Map();
let order = 0;
// Whether the workflow in sight has all its nodes, and its tab is the open one.
let isSettled = false;
let show = () => {};

/** Every node of ours with the id that it runs under: those of a subgraph begin with the subgraph's. */
export function* ours(graph = wholeGraph(), prefix = "") {
  for (const node of graph?.nodes ?? []) {
    if (OURS.has(node.type)) yield [`${prefix}${node.id}`, node];
    if (node.subgraph) yield* ours(node.subgraph, `${prefix}${node.id}:`);
  }
}

function nodeAt(id) {
  return [...ours()].find(([each]) => each === String(id))?.[1];
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

/** What the node shows: of its tab, or of prompts that were queued elsewhere from the same workflow. */
function stateOf(id) {
  const known = [placeInSight(), wholeGraph().id].map((place) => kept.get(place)?.get(id)).filter(Boolean);
  return known.sort((a, b) => b.order - a.order)[0];
}

export function stateOfNode(node) {
  const [id] = [...ours()].find(([, each]) => each === node) ?? [];
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
  "qwenvl.progress": ({ node, prompt_id: prompt, workflow, ...told }) =>
    put(placeOf(prompt, workflow), node, prompt, { workflow, ...told }),
  executed({ node, prompt_id: prompt, output }) {
    const place = placeOf(prompt, workflowOf(prompt));
    if (!output?.text || !place) return;
    const before = kept.get(place)?.get(node);
    // What has told nothing yet may be another pack's.
    if (!before && !(isInSight(place) && nodeAt(node))) return;
    const answer = answerOf(output);
    // From the cache: how it was made is what it was.
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

/** ComfyUI refuses a prompt with a list of what is wrong by node, the same sentence for several inputs at times. */
function showRefused(place, errors) {
  for (const [id, { errors: found = [], class_type: type }] of Object.entries(errors)) {
    if (!OURS.has(type)) continue;
    const sentences = found.map(({ message, details, extra_info: more }) => {
      const name = more?.input_name;
      const said = String(details ?? "");
      const reason = name && said.startsWith(`${name} - `) ? said.slice(name.length + 3) : said;
      return reason && reason !== name ? reason : [message, said].filter(Boolean).join(": ");
    });
    put(place, id, `refused ${order}`, failed([...new Set(sentences)].join("\n")));
  }
}

/** Of the newest run that has something to tell of the node. */
function outcome(id, { outputs, status }) {
  for (const [kind, { node_id: node, exception_message: message }] of status?.messages ?? []) {
    if (String(node) !== id) continue;
    if (kind === "execution_error") return failed(message);
    if (kind === "execution_interrupted") return { state: "cancelled" };
  }
  return outputs?.[id]?.text ? answerOf(outputs[id]) : undefined;
}

const looked = new Set();

/** What became of the nodes in sight in runs that this page has not seen end. */
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
    const [prompt, found] = mine.map(([prompt, run]) => [prompt, outcome(id, run)]).find(([, each]) => each) ?? [];
    if (found) put(place, id, prompt, found);
  }
  await endWhatIsGone(place);
}

/** What still seems to run and is in no queue any more was ended with the server. */
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

/** Show what belongs to the workflow in sight on its nodes. */
async function showAll() {
  isSettled = true;
  adopt(placeInSight());
  for (const [id, node] of ours()) {
    const state = stateOf(id) ?? node.qwenvl_answer;
    if (state) show(node, state);
  }
  await lookThroughHistory();
}

/** What is kept by the path of a tab from before the page was loaded anew belongs to the tab. */
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

/** @param shown called with a node and what it shows now. @param prepare see runs.js. */
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
