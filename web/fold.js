// Folds widgets marked as advanced until a button on the node is pressed. A widget stays visible while its value is
// changed or it is connected. Pages that draw nodes as HTML do this themselves, with their own button; this one is for
// the canvas.

import { word } from "./words.js";

function isConnected(node, widget) {
  return node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
}

function hide(widget, yes) {
  // Since 1.58, hidden would count on nodes drawn as HTML and in the panel too; this is for the canvas alone.
  widget[widget.visibility ? "advanced" : "hidden"] = yes;
  // Pages keep room for what is not seen; -4 takes away the margin of 4 pixels below it too.
  if (yes) widget.computeSize = () => [0, -4];
  else delete widget.computeSize;
}

/** @param node a new node. */
export function addFold(node, showAll) {
  const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
  const firstValues = new Map(advanced.map((widget) => [widget, widget.value]));
  const folded = new Set();
  let isOpen = false;
  if (!firstValues.size) return;
  // Prompts that are queued leave it out by its options.
  const options = { canvasOnly: true, serialize: false };
  const button = node.addWidget("button", "qwenvl_more", null, () => show(!node.showAdvanced, true), options);
  // Workflows save widget values by position, and this widget must not take one.
  button.serialize = false;

  function isWanted(widget, value) {
    return node.showAdvanced || widget.value !== value || isConnected(node, widget);
  }

  /** Fold or unfold by node.showAdvanced, which pages save with the node. */
  function refold() {
    for (const [widget, value] of firstValues) {
      const isFolded = !isWanted(widget, value);
      hide(widget, isFolded);
      folded[isFolded ? "add" : "delete"](widget);
    }
    node.setDirtyCanvas(true, true);
  }

  function show(all, resize) {
    node.showAdvanced = isOpen = all;
    button.label = all ? `${word("fewer settings")}  ▴` : `${word("more settings")}  ▾`;
    refold();
    if (resize) node.setSize([node.size[0], node.computeSize()[1]]);
  }

  const { onConfigure, onConnectionsChange, onDrawBackground } = node;
  node.onConfigure = function () {
    onConfigure?.apply(this, arguments);
    show(Boolean(node.showAdvanced), false);
  };
  node.onConnectionsChange = function () {
    onConnectionsChange?.apply(this, arguments);
    refold();
  };
  // No event says that a panel, another script, or the page's own button has changed something, but a changed node is
  // drawn again.
  node.onDrawBackground = function () {
    onDrawBackground?.apply(this, arguments);
    if (isOpen !== Boolean(node.showAdvanced)) return show(Boolean(node.showAdvanced), true);
    for (const widget of folded) if (isWanted(widget, firstValues.get(widget))) return grow();
  };

  function grow() {
    refold();
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  }

  show(showAll, true);
}
