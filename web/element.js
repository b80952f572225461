// HTML that the other files build.

export function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

/** Add a style sheet once. */
export function addStyle(id, style) {
  if (!document.getElementById(id)) document.head.append(element("style", { id, textContent: style }));
}
