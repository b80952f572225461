// A tab in the sidebar that lists the models of this pack in memory: size, time of loading, and a button that unloads
// one. It polls the server only while it is open.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addStyle, element } from "./element.js";
import { word } from "./words.js";

const REFRESH_MS = 2000;
// The server's name for the place of a model that is parked in RAM.
const WAITING = "RAM, waiting";

const STYLE = `
.qwenvl-models { padding: 12px; display: flex; flex-direction: column; gap: 10px; color: var(--fg-color);
  font-size: 13px; height: 100%; overflow: auto; box-sizing: border-box; }
.qwenvl-models h3 { margin: 0; font-size: 15px; }
.qwenvl-models article + article { margin-top: 10px; }
.qwenvl-models article { border: 1px solid var(--border-color); border-radius: 6px; padding: 8px 10px; }
.qwenvl-models article p { margin: 4px 0; color: var(--descrip-text); }
.qwenvl-models button { border: 1px solid var(--border-color); border-radius: 4px; padding: 2px 10px;
  background: var(--comfy-input-bg); color: var(--input-text); cursor: pointer; }
.qwenvl-models button:disabled { opacity: 0.6; cursor: default; }
`;

function size(bytes) {
  return bytes < 1e9 ? `${Math.max(1, Math.round(bytes / 1e6))} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

function since(seconds) {
  const minutes = Math.floor((Date.now() / 1000 - seconds) / 60);
  const clock = new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (minutes < 60) return word("since {clock} ({minutes} min)", { clock, minutes });
  return word("since {clock} ({hours} h {minutes} min)", { clock, hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

/** Unload a model. @returns text: a few words about it; waits: true if it unloads only after the current run. */
async function unload(model) {
  const response = await api.fetchApi("/qwenvl/unload", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model }),
  });
  if (!response.ok) return { isRefused: true, text: word("Refused ({status})", response) };
  const waits = (await response.json()).unloads === "after this run";
  return { waits, text: waits ? word("Unloads after this run") : word("Unloads now") };
}

function row({ key, model, quantization, devices, bytes, since: loadedAt }, going) {
  const button = element("button", { textContent: going.has(key) ? word("Unloads after this run") : word("Unload") });
  button.disabled = going.has(key);
  button.title = word("Give its memory back. While a prompt runs, this waits until it has ended.");
  const offer = () => Object.assign(button, { textContent: word("Unload"), disabled: false });
  button.onclick = async () => {
    button.disabled = true;
    try {
      const { waits, isRefused, text } = await unload(key);
      button.textContent = text;
      if (waits) going.add(key);
      if (isRefused) setTimeout(offer, REFRESH_MS);
    } catch {
      offer(); // the server is away
    }
  };
  const precision = quantization === "none" ? word("unquantized") : quantization;
  const places = devices.map((device) => (device === WAITING ? word("RAM, waiting") : device)).join(", ");
  return element(
    "article",
    {},
    element("strong", { textContent: model }),
    element("p", { textContent: word("{size}, {precision}, on {places}", { size: size(bytes), precision, places }) }),
    element("p", { textContent: since(loadedAt) }),
    button,
  );
}

function render(container) {
  addStyle("qwenvl-models-style", STYLE);
  const list = element("div");
  const area = element("div", { className: "qwenvl-models" }, element("h3", { textContent: word("QwenVL models") }), list);
  container.replaceChildren(area);
  const going = new Set(); // models that unload when a run has ended
  let shown = "";
  async function refresh() {
    if (!area.isConnected) return;
    setTimeout(refresh, REFRESH_MS);
    const response = await api.fetchApi("/qwenvl/models").catch(() => null);
    if (!response) return; // the server is away; what was known stays
    if (!response.ok) {
      shown = "";
      list.replaceChildren(element("p", { textContent: `${word("Refused ({status})", response)}: ${await response.text()}` }));
      return;
    }
    const { models } = await response.json();
    for (const key of going) if (!models.some((model) => model.key === key)) going.delete(key);
    const state = JSON.stringify([models, Math.floor(Date.now() / 60000)]);
    if (state === shown) return; // otherwise a button would be replaced while it is pressed
    shown = state;
    const nothing = element("p", { textContent: word("None is in memory. A node loads its model when it runs.") });
    list.replaceChildren(...(models.length ? models.map((model) => row(model, going)) : [nothing]));
  }
  setTimeout(refresh); // when the container is in the page
}

const ID = "qwenvl-models";
let isShown = false;

/** Add the tab to the sidebar, or remove it. */
export function showSidebar(isWanted) {
  const page = app.extensionManager;
  if (isWanted === isShown || !page?.registerSidebarTab) return;
  isShown = isWanted;
  if (!isWanted) return page.unregisterSidebarTab?.(ID);
  const tooltip = word("QwenVL: models in memory");
  page.registerSidebarTab({ id: ID, icon: "pi pi-eye", title: "QwenVL", tooltip, type: "custom", render });
}

app.registerExtension({
  name: "QwenVL.models",
  setup: () => showSidebar(app.extensionManager?.setting?.get("QwenVL.Sidebar") !== false),
});
