// Remembers which workflow a prompt was queued from, so that its results are shown only there. Many workflows have the
// same node ids, and two tabs may hold one workflow with one id, so workflows are identified by their tab.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const STORE = "QwenVL.runs";
const REMEMBERED = 200;

// Prompt id -> the tab that it was queued from, or the tab's path if the page was reloaded since.
const queued = new Map();
let queueing = Promise.resolve();

export function wholeGraph() {
  return app.rootGraph ?? app.graph.rootGraph ?? app.graph;
}

function tabs() {
  return app.extensionManager?.workflow;
}

/** Return the key of the visible workflow: its tab. Pages without tabs have one workflow at a time: return its id. */
export function placeInSight() {
  return tabs()?.activeWorkflow ?? wholeGraph().id;
}

/** Return the workflow of a prompt, as placeInSight() does; its id if another page queued the prompt. */
export function placeOf(prompt, workflow) {
  const known = queued.get(prompt);
  return known === undefined ? workflow : (placeAt(known) ?? known);
}

export function isInSight(place) {
  return Boolean(place) && (place === placeInSight() || place === wholeGraph().id);
}

/** Replace a tab by its path, which can be kept while the page reloads. */
export function written(place) {
  return place?.path ?? place;
}

export function placeAt(path) {
  return tabs()?.openWorkflows?.find?.((tab) => tab.path === path);
}

/** Resolve once the workflows of the prompts that are being queued now are known. */
export function whenQueued() {
  return queueing;
}

/**
 * Watch every prompt that the page queues.
 *
 * @param prepare called with the prompt before it is sent.
 * @param refused called with the workflow and ComfyUI's errors by node, {} if there are none.
 */
export function watchQueue(prepare, refused) {
  const { queuePrompt } = api;
  async function queue(place, given) {
    try {
      await prepare(given[1]?.output ?? {});
      const response = await queuePrompt.apply(api, given);
      queued.set(response.prompt_id, place);
      if (queued.size > REMEMBERED) queued.delete(queued.keys().next().value);
      refused(place, response.node_errors ?? {});
      return response;
    } catch (error) {
      refused(place, error?.response?.node_errors ?? {});
      throw error;
    }
  }
  api.queuePrompt = function (...given) {
    const response = queue(placeInSight(), given);
    queueing = response.catch(() => {});
    return response;
  };
}

/**
 * Watch every workflow that becomes visible, or is loaded again, for example by undo.
 *
 * @param begin called before its nodes are created. @param end called when they exist and its tab is the open one.
 */
export function watchWorkflows(begin, end) {
  const { loadGraphData } = app;
  app.loadGraphData = async function () {
    begin();
    try {
      return await loadGraphData.apply(app, arguments);
    } finally {
      end();
    }
  };
  tabs()?.$onAction?.(({ name, after }) => {
    if (name === "openWorkflow") after(end);
  });
}

/** Keep a value over a reload of the page: give() returns it at the end, and take() gets it at once afterwards. */
export function overReloads(give, take) {
  let before = {};
  try {
    before = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  } catch {
    console.warn("QwenVL: the data kept over the reload is not valid JSON.");
  }
  sessionStorage.removeItem(STORE);
  for (const [prompt, path] of before.queued ?? []) queued.set(prompt, path);
  take(before.kept ?? []);
  window.addEventListener("pagehide", () => {
    const paths = [...queued].map(([prompt, place]) => [prompt, written(place)]);
    try {
      sessionStorage.setItem(STORE, JSON.stringify({ queued: paths, kept: give() }));
    } catch (error) {
      console.warn(`QwenVL: answers are not kept: ${error}`); // the browser's storage is full
    }
  });
}
