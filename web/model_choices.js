// Facts about a model before it runs: if it is on this machine or how much would be downloaded, and if it fits into
// memory. The figures come from the server, and are fetched again when they may have changed.

import { api } from "../../scripts/api.js";
import { word } from "./words.js";

const LARGE_DOWNLOAD = 1e9;
// Bytes that a prompt with a picture needs in addition to the weights.
const BESIDE = 0.6e9;

let table = { models: {}, memory: {}, forbidden: null };

/** Fetch the figures. @returns true if the server answered. */
export async function refreshChoices() {
  try {
    const response = await api.fetchApi("/qwenvl/choices");
    if (response.ok) table = await response.json();
    return response.ok;
  } catch {
    return false; // the server is unreachable; keep the old figures
  }
}

export function isKnown(model) {
  return model in table.models;
}

/** Return true if a run would download the model. */
export function isMissing(model) {
  return table.models[model]?.place === "hub";
}

export function size(bytes) {
  if (!bytes) return "0 MB";
  return bytes < 1e9 ? `${Math.max(1, Math.round(bytes / 1e6))} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

/** Describe a model in a few words for a list; ready is true if it runs without a download. */
export function mark(model) {
  const { place, disk } = table.models[model] ?? {};
  if (place === "here") return { ready: true, text: word("on this machine") };
  if (place === "elsewhere") return { ready: true, text: word("runs elsewhere") };
  if (place === "damaged") return { ready: false, text: word("damaged") };
  return { ready: false, text: disk ? word("{size} to download", { size: size(disk) }) : word("to be downloaded") };
}

function where(model, download) {
  const { place, disk } = table.models[model];
  if (place === "hub" && (download === "never" || table.forbidden)) {
    return { tone: "bad", text: word("not on this machine, and downloads are off") };
  }
  const tones = { here: "quiet", elsewhere: "quiet", damaged: "bad", hub: disk > LARGE_DOWNLOAD ? "warning" : "quiet" };
  return { tone: tones[place], text: mark(model).text };
}

function fit(model, quantization, device) {
  const { memory } = table.models[model];
  const needed = memory[quantization] ?? memory.fp8 ?? memory.none;
  const room = table.memory[device];
  if (!needed || !room) return { tone: "quiet", text: "" };
  const values = { needed: size(needed), room: size(room) };
  if (needed + BESIDE <= room) return { tone: "quiet", text: word("needs {needed} of {room}: fits", values) };
  return { tone: "bad", text: word("needs {needed} of {room}: does not fit", values) };
}

/**
 * Describe the chosen model in one line, with a tone: quiet, warning or bad. Nothing before the figures are there.
 * @param values the values of the node's widgets.
 */
export function describe({ model, quantization, device, download }) {
  if (!Object.keys(table.models).length) return null;
  if (!isKnown(model)) return { tone: "bad", text: word("not in the list of this machine") };
  const parts = [where(model, download), fit(model, quantization, device)];
  const tone = ["bad", "warning", "quiet"].find((name) => parts.some((part) => part.tone === name));
  return { tone, text: parts.map(({ text }) => text).filter(Boolean).join(" · ") };
}
