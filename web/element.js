// Helpers with which the other files build HTML.

export function element(name, attributes = {}, ...children) {
  const created = Object.assign(document.createElement(name), attributes);
  created.append(...children);
  return created;
}

/** Add a style sheet once. */
export function addStyle(id, style) {
  if (!document.getElementById(id)) document.head.append(element("style", { id, textContent: style }));
}
