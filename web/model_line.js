// The lines below the model on a node: if it is on this machine and fits, and that the node sees no picture. On the
// canvas they are drawn into room below the model's widget, so that no widget comes between those that are saved by
// position; on nodes drawn as HTML they are a widget, the last one. The marks in the list of models are here too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addStyle, element } from "./element.js";
import { isKnown, mark, refreshChoices, describe } from "./model_choices.js";
import { word } from "./words.js";

const NODES = new Set();
const WIDGET = "qwenvl_model";
const HTML_SETTING = "Comfy.VueNodes.Enabled";
const LINE = 14;
const MARGIN = 15;
// Mixed with the colour of text, so that they can be read in light themes and in dark ones.
const TONES = { quiet: "#8a8f98", warning: "#d08700", bad: "#e2492f" };
const [NEVER, BYPASS] = [2, 4];

const STYLE = `
.qwenvl-model { font-size: 11px; line-height: 1.35; padding: 0 6px; overflow: hidden; }
.qwenvl-mark { float: right; margin-left: 14px; opacity: 0.75; font-size: 0.9em; }
.qwenvl-mark.ready { color: color-mix(in srgb, #3fae46 65%, var(--input-text)); opacity: 1; }
`;

const isHtml = () => Boolean(window.LiteGraph?.vueNodesMode);

function colour(tone, ofText) {
  return `color-mix(in srgb, ${TONES[tone]} 75%, ${ofText})`;
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function isLinked(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null);
}

/** Check that an input delivers something: a muted node does not, nor does a bypassed node without input. */
function isGiven(node, { link }) {
  if (link == null) return false;
  const { origin_id: id } = node.graph?.getLink?.(link) ?? node.graph?.links?.get?.(link) ?? {};
  const origin = node.graph?.getNodeById?.(id);
  if (!origin) return true;
  return origin.mode !== NEVER && !(origin.mode === BYPASS && !origin.inputs?.some((input) => input.link != null));
}

function seesNothing(node) {
  const looks = node.inputs?.filter(({ type }) => type === "IMAGE" || type === "VIDEO") ?? [];
  if (!looks.length || widgetOf(node, "bypass")?.value) return false;
  const path = widgetOf(node, "video_path")?.value || isLinked(node, "video_path");
  return !path && !looks.some((input) => isGiven(node, input));
}

function linesOf(node) {
  const value = (name) => widgetOf(node, name)?.value;
  const names = ["model", "quantization", "device", "download"];
  const lines = isLinked(node, "model") ? [] : [describe(Object.fromEntries(names.map((name) => [name, value(name)])))];
  if (seesNothing(node)) lines.push({ tone: "quiet", text: word("sees no picture: answers from the text alone") });
  return lines.filter(Boolean);
}

/** Reserve room below the model, and draw the lines there. */
function drawBelow(node, widget) {
  widget.computeSize = (width) => [width, LiteGraph.NODE_WIDGET_HEIGHT + (isHtml() ? 0 : LINE * linesOf(node).length)];
  const { onDrawForeground } = node;
  node.onDrawForeground = function (context, canvas) {
    onDrawForeground?.apply(this, arguments);
    if (this.flags.collapsed || canvas?.low_quality || isHtml()) return;
    const place = () => widget.y ?? widget.last_y;
    const before = place();
    // Pages place the widgets after this.
    queueMicrotask(() => place() !== before && this.setDirtyCanvas(true, true));
    const top = before + LiteGraph.NODE_WIDGET_HEIGHT;
    context.save();
    context.font = "11px sans-serif";
    context.textAlign = "left";
    context.textBaseline = "middle";
    linesOf(this).forEach(({ tone, text }, row) => {
      context.fillStyle = colour(tone, LiteGraph.WIDGET_TEXT_COLOR);
      context.fillText(text, MARGIN + 4, top + LINE * (row + 0.5) + 1, this.size[0] - 2 * MARGIN - 8);
    });
    context.restore();
  };
}

/** Show the lines as a widget, for nodes drawn as HTML. */
function showAsHtml(node) {
  const there = widgetOf(node, WIDGET);
  if (!isHtml()) {
    if (there) node.widgets.splice(node.widgets.indexOf(there), 1);
    there?.onRemove?.();
    return;
  }
  const widget = there ?? addWidget(node);
  const lines = linesOf(node);
  widget.element.replaceChildren(
    ...lines.map(({ tone, text }) => {
      const line = element("div", { textContent: text });
      line.style.color = colour(tone, "var(--input-text)");
      return line;
    }),
  );
}

function addWidget(node) {
  const height = () => 2 * LINE + 6;
  // The panel beside the workflow would list its name.
  const options = { serialize: false, hideInPanel: true, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget(WIDGET, "note", element("div", { className: "qwenvl-model" }), options);
  // Workflows save widget values by position, and this widget must not take one.
  widget.serialize = false;
  return widget;
}

function update(node) {
  showAsHtml(node);
  node.setDirtyCanvas?.(true, true);
}

function* everyNode(graph) {
  for (const node of graph?.nodes ?? []) {
    if (NODES.has(node.comfyClass)) yield node;
    if (node.subgraph) yield* everyNode(node.subgraph);
  }
}

function updateAll() {
  for (const node of everyNode(app.rootGraph ?? app.graph?.rootGraph ?? app.graph)) update(node);
}

async function refresh() {
  if (await refreshChoices()) updateAll();
}

/** Add to every entry of the opened list of models where that model is. */
function markMenu(menu) {
  const entries = [...menu.querySelectorAll(".litemenu-entry")];
  const models = entries.filter((entry) => isKnown(entry.dataset.value));
  if (models.length < 2 || models.length < entries.length / 2) return;
  for (const entry of models) {
    const { ready, text } = mark(entry.dataset.value);
    entry.append(element("span", { className: `qwenvl-mark${ready ? " ready" : ""}`, textContent: text }));
  }
}

function watchMenus() {
  const observer = new MutationObserver((changes) => {
    for (const { addedNodes } of changes) {
      for (const added of addedNodes) if (added.classList?.contains("litecontextmenu")) queueMicrotask(() => markMenu(added));
    }
  });
  observer.observe(document.body, { childList: true });
}

/** Label the entries on nodes drawn as HTML; on the canvas, labels would remove the list's search field. */
function labelAsHtml(widget) {
  const label = (model) => (model && isKnown(model) ? `${model} · ${mark(model).text}` : (model ?? ""));
  Object.defineProperty(widget.options, "getOptionLabel", {
    configurable: true,
    enumerable: true,
    get: () => (isHtml() ? label : undefined),
  });
}

function watch(node) {
  for (const name of ["model", "quantization", "device", "download", "bypass", "video_path"]) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    const { callback } = widget;
    widget.callback = function () {
      const returned = callback?.apply(this, arguments);
      update(node);
      return returned;
    };
  }
  for (const event of ["onConfigure", "onConnectionsChange"]) {
    const before = node[event];
    node[event] = function () {
      const returned = before?.apply(this, arguments);
      update(this);
      return returned;
    };
  }
}

app.registerExtension({
  name: "QwenVL.model",
  async setup() {
    addStyle("qwenvl-model-style", STYLE);
    watchMenus();
    for (const event of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(event, refresh);
    app.ui?.settings?.addEventListener?.(`${HTML_SETTING}.change`, () => setTimeout(updateAll, 100));
    await refresh();
  },
  beforeRegisterNodeDef(nodeType, { name, category, input }) {
    if (category === "QwenVL" && input?.required?.model) NODES.add(name);
  },
  nodeCreated(node) {
    const widget = NODES.has(node.comfyClass) && widgetOf(node, "model");
    if (!widget) return;
    drawBelow(node, widget);
    labelAsHtml(widget);
    watch(node);
    update(node);
  },
  refreshComboInNodes: refresh,
  afterConfigureGraph: updateAll,
});
