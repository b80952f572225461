// What is to be said of a model before it runs: whether it is on this machine or how much would be downloaded, and
// whether it fits into memory. The server has the figures; they are asked for anew when something may have changed.

import { api } from "../../scripts/api.js";
import { word } from "./words.js";

const LARGE_DOWNLOAD = 1e9;
// Of a prompt with a picture, beside the weights.
const BESIDE = 0.6e9;

let table = { models: {}, memory: {}, forbidden: null };

/** @returns whether the server has told. */
export async function refreshChoices() {
  try {
    const response = await api.fetchApi("/qwenvl/choices");
    if (response.ok) table = await response.json();
    return response.ok;
  } catch {
    return false; // the server is away; what was known stays
  }
}

export function isKnown(model) {
  return model in table.models;
}

/** Whether a run would download it. */
export function isMissing(model) {
  return table.models[model]?.place === "hub";
}

export function size(bytes) {
  return bytes < 1e9 ? `${Math.max(1, Math.round(bytes / 1e6))} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

/** A few words for a list, and whether it can run without a download. */
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
 * One line about the model that is chosen, and how grave it is: quiet, warning or bad. Nothing while nothing is known.
 * @param values of the node's widgets.
 */
export function told({ model, quantization, device, download }) {
  if (!Object.keys(table.models).length) return null;
  if (!isKnown(model)) return { tone: "bad", text: word("not in the list of this machine") };
  const parts = [where(model, download), fit(model, quantization, device)];
  const tone = ["bad", "warning", "quiet"].find((each) => parts.some((part) => part.tone === each));
  return { tone, text: parts.map(({ text }) => text).filter(Boolean).join(" · ") };
}
