// Shows few widgets at first: those marked as advanced are folded away until a button on the node is pressed. One stays
// in sight while it holds something else than at first, or is connected. Pages that draw nodes as HTML do this by
// themselves, with a button of their own; ours is for the canvas.

import { word } from "./words.js";

function isConnected(node, widget) {
  return node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
}

function hide(widget, yes) {
  widget.hidden = yes;
  // Older pages leave room for what is hidden; widgets have a margin of 4 below.
  if (yes) widget.computeSize = () => [0, -4];
  else delete widget.computeSize;
}

/** @param node a new one. */
export function addFold(node, showAll) {
  const firstValues = new Map((node.widgets ?? []).filter((each) => each.options?.advanced).map((each) => [each, each.value]));
  if (!firstValues.size) return;
  // Prompts that are queued leave it out by its options.
  const options = { canvasOnly: true, serialize: false };
  const button = node.addWidget("button", "qwenvl_more", null, () => show(!node.showAdvanced, true), options);
  // Saved workflows are read by position: this is no value of theirs.
  button.serialize = false;

  function isWanted(widget, value) {
    return node.showAdvanced || widget.value !== value || isConnected(node, widget);
  }

  /** Make the node look as node.showAdvanced says, which pages save with it. */
  function refold() {
    for (const [widget, value] of firstValues) hide(widget, !isWanted(widget, value));
    node.setDirtyCanvas(true, true);
  }

  function show(all, resize) {
    node.showAdvanced = all;
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
  // Nobody tells when a panel or another script has changed a value, but what is changed is drawn anew.
  node.onDrawBackground = function () {
    onDrawBackground?.apply(this, arguments);
    for (const [widget, value] of firstValues) {
      if (widget.hidden && isWanted(widget, value)) return grow();
    }
  };

  function grow() {
    refold();
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  }

  show(showAll, true);
}
