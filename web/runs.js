// Which workflow a prompt was queued from: what comes of it is shown there and nowhere else. The same node ids are in
// many workflows, and two tabs may even hold one workflow with one id, so it is the tab that tells them apart.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const STORE = "QwenVL.runs";
const REMEMBERED = 200;

// Prompt id -> the tab that it was queued from, or the tab's path where that was before the page was loaded anew.
const queued = new Map();
let queueing = Promise.resolve();

export function wholeGraph() {
  return app.rootGraph ?? app.graph.rootGraph ?? app.graph;
}

function tabs() {
  return app.extensionManager?.workflow;
}

/** What stands for the workflow in sight: its tab. Pages that know no tabs have one workflow at a time, with an id. */
export function placeInSight() {
  return tabs()?.activeWorkflow ?? wholeGraph().id;
}

/** The workflow that a prompt belongs to, as in placeInSight(). Of a prompt that another page has queued, its id. */
export function placeOf(prompt, workflow) {
  const known = queued.get(prompt);
  return known === undefined ? workflow : (placeAt(known) ?? known);
}

export function isInSight(place) {
  return Boolean(place) && (place === placeInSight() || place === wholeGraph().id);
}

/** A path in place of a tab: what can be kept while the page is loaded anew. */
export function written(place) {
  return place?.path ?? place;
}

export function placeAt(path) {
  return tabs()?.openWorkflows?.find?.((tab) => tab.path === path);
}

/** Resolves when it is known where the prompts belong that are being queued now. */
export function whenQueued() {
  return queueing;
}

/**
 * See every prompt that the page queues.
 *
 * @param prepare called with what will be sent, before it is.
 * @param refused called with the workflow and what ComfyUI says is wrong, by node, where it is.
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
 * See every workflow that comes into sight, or comes anew, as when something is undone.
 *
 * @param begin called before its nodes are made. @param end called when they are there and its tab is the open one.
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

/** Keep something while the page is loaded anew: what give() gives at its end, take() is given at once. */
export function overReloads(give, take) {
  let before = {};
  try {
    before = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  } catch {
    console.warn("QwenVL: what was kept of the page before is no JSON.");
  }
  sessionStorage.removeItem(STORE);
  for (const [prompt, path] of before.queued ?? []) queued.set(prompt, path);
  take(before.kept ?? []);
  window.addEventListener("pagehide", () => {
    const paths = [...queued].map(([prompt, place]) => [prompt, written(place)]);
    try {
      sessionStorage.setItem(STORE, JSON.stringify({ queued: paths, kept: give() }));
    } catch (error) {
      console.warn(`QwenVL: answers are not kept: ${error}`); // the browser has no room
    }
  });
}
