// What the page's scripts use of a browser, of litegraph and of ComfyUI's page, for Node.js: enough to see what a user
// would see, and nothing that makes a script look right. Elements have no innerHTML: a text is never to become HTML.

import { readFile } from "node:fs/promises";
import { setImmediate as turn } from "node:timers/promises";

class Element {
  dataset = {};
  style = {};
  children = [];
  parent = null;
  className = "";
  hidden = false;
  // As the browser would lay it out: the test says so.
  scrollTop = 0;
  scrollHeight = 0;
  clientHeight = 0;
  #text = "";

  constructor(tag) {
    this.tag = tag;
  }

  append(...children) {
    for (const child of children) {
      child.remove();
      child.parent = this;
      this.children.push(child);
    }
  }

  remove() {
    if (this.parent) this.parent.children = this.parent.children.filter((each) => each !== this);
    this.parent = null;
  }

  replaceChildren(...children) {
    for (const child of [...this.children]) child.remove();
    this.append(...children);
  }

  get textContent() {
    return this.#text + this.children.map((child) => child.textContent).join("");
  }

  set textContent(text) {
    this.replaceChildren();
    this.#text = String(text);
  }

  set innerHTML(html) {
    throw new Error(`a text would become HTML: ${html}`);
  }

  get isConnected() {
    return this === document.body || this === document.head || Boolean(this.parent?.isConnected);
  }

  /** All that is in it, by "tag" or ".class". */
  all(wanted) {
    const is = (each) => (wanted.startsWith(".") ? each.className.split(" ").includes(wanted.slice(1)) : each.tag === wanted);
    return this.children.flatMap((child) => [...(is(child) ? [child] : []), ...child.all(wanted)]);
  }

  one(wanted) {
    return this.all(wanted)[0];
  }

  select() {
    document.selected = this;
  }
}

/** A node as litegraph has it: what its widgets save, and how high it must be. */
export class Node {
  size = [200, 40];
  widgets = [];
  inputs = [];
  drawn = 0;

  constructor(widgets = [], type = "QwenVL") {
    this.type = this.comfyClass = type;
    for (const { name, value, options } of widgets) this.addWidget("any", name, value, null, { ...options });
  }

  addWidget(type, name, value, callback, options = {}) {
    const widget = { type, name, value, callback, options, hidden: false };
    this.widgets.push(widget);
    return widget;
  }

  addDOMWidget(name, type, element, options = {}) {
    document.body.append(element);
    const widget = { ...this.addWidget(type, name, undefined, null, options), element };
    widget.computeSize = () => [0, options.getMinHeight()];
    this.widgets.splice(-1, 1, widget);
    return widget;
  }

  /** As older pages do it: for what is hidden too. */
  computeSize() {
    const heights = this.widgets.map((widget) => (widget.computeSize ? widget.computeSize()[1] : 20) + 4);
    return [200, heights.reduce((sum, each) => sum + each, 40)];
  }

  setSize(size) {
    this.size = [...size];
  }

  setDirtyCanvas() {
    this.drawn += 1;
  }

  draw() {
    this.onDrawBackground?.();
  }

  press(name) {
    this.widgets.find((widget) => widget.name === name).callback();
  }

  /** The names of the widgets in sight. */
  get seen() {
    return this.widgets.filter(({ hidden }) => !hidden).map(({ name }) => name);
  }

  serialize() {
    const info = { widgets_values: [], showAdvanced: this.showAdvanced };
    for (const [place, widget] of this.widgets.entries()) {
      if (widget.serialize !== false) info.widgets_values[place] = widget.value;
    }
    return info;
  }

  configure(info) {
    this.showAdvanced = info.showAdvanced;
    const values = [...info.widgets_values];
    for (const widget of this.widgets) if (widget.serialize !== false && values.length) widget.value = values.shift();
    this.onConfigure?.(info);
  }
}

const timers = [];
let now = Date.UTC(2026, 0, 1, 12);

/** What is waited for goes on, and the page's clock too. */
export async function pass(ms = 0) {
  now += ms;
  for (;;) {
    for (let each = 0; each < 20; each++) await turn();
    const place = timers.findIndex(({ at }) => at <= now);
    if (place < 0) return;
    timers.splice(place, 1)[0].run();
  }
}

export const clipboard = {
  text: null,
  async writeText(text) {
    this.text = text;
  },
};

export const document = {
  head: new Element("head"),
  body: new Element("body"),
  createElement: (tag) => new Element(tag),
  getElementById(id) {
    return [...this.head.children, ...this.body.children].find((each) => each.id === id) ?? null;
  },
  execCommand(name) {
    if (name === "copy") clipboard.text = this.selected.value;
  },
};

export const settings = {};
export const tabs = {}; // of the sidebar
export const asked = []; // of the server
// Path -> (body) => what the server says, or {status, text}, or an error where it is away.
export const server = {};

const heard = {};
export const api = {
  async fetchApi(path, options) {
    asked.push({ path, ...(options?.body && { method: options.method, body: JSON.parse(options.body) }) });
    const said = server[path.split("?")[0]]?.(asked.at(-1).body) ?? {};
    if (said instanceof Error) throw said;
    const status = said.status ?? 200;
    return { status, ok: status < 400, json: async () => said, text: async () => said.text };
  },
  addEventListener: (name, hear) => (heard[name] ??= []).push(hear),
  queued: 0,
  async queuePrompt() {
    const said = server.queue?.() ?? { prompt_id: `prompt ${++this.queued}` };
    if (said instanceof Error) throw said;
    return said;
  },
};

/** The server says something to the page. */
export async function tell(name, detail) {
  for (const hear of heard[name] ?? []) hear({ detail });
  await pass();
}

export const extensions = [];
const workflow = { activeWorkflow: { path: "first.json" }, openWorkflows: [] };
workflow.openWorkflows.push(workflow.activeWorkflow);
export const app = {
  graph: { id: "a graph", nodes: [] },
  registerExtension: (extension) => extensions.push(extension),
  async loadGraphData(nodes) {
    this.graph.nodes = nodes;
  },
  extensionManager: {
    workflow,
    setting: { get: (name) => settings[name] },
    registerSidebarTab: (tab) => (tabs[tab.id] = tab),
    unregisterSidebarTab: (id) => delete tabs[id],
  },
};

/** Another tab comes into sight, with these nodes. */
export async function open(path, nodes) {
  const known = workflow.openWorkflows.find((tab) => tab.path === path);
  workflow.activeWorkflow = known ?? { path };
  if (!known) workflow.openWorkflows.push(workflow.activeWorkflow);
  await app.loadGraphData(nodes);
  await pass();
}

async function fetchFile(url) {
  const text = await readFile(url, "utf-8");
  return { ok: true, json: async () => JSON.parse(text) };
}

const store = {};
const sessionStorage = {
  getItem: (name) => store[name] ?? null,
  setItem: (name, text) => (store[name] = text),
  removeItem: (name) => delete store[name],
};
const leaving = [];
const window = { addEventListener: (name, hear) => name === "pagehide" && leaving.push(hear) };

/** The page is left: what the scripts keep of it. */
export function leave() {
  for (const hear of leaving) hear();
  return store;
}

const replaced = { document, window, sessionStorage, fetch: fetchFile, navigator: { clipboard } };
for (const [name, value] of Object.entries(replaced)) {
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
}
globalThis.setTimeout = (run, ms = 0) => timers.push({ run, at: now + ms });
Date.now = () => now;
