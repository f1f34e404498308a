// Elements and texts. Everything that is shown goes through `textContent`: what a peer wrote is text and stays text.

/** An element with a class, attributes and children; a child that is a string becomes a text node. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Set an element's text if it differs, so that selections and screen readers are not disturbed. */
export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/**
 * Make the children of `parent` those of `items`, in their order, and keep what stays: focus, scroll, selection.
 * `make(item)` makes an element, `fill(element, item)` brings it up to date.
 */
export function reconcile(parent, items, key, make, fill) {
  const existing = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const id = String(key(item));
    let child = existing.get(id);
    existing.delete(id);
    if (child === undefined) {
      child = make(item);
      child.dataset.key = id;
    }
    fill(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const gone of existing.values()) gone.remove();
}

const LETTERS = {
  New: "N", StartTLS: "T", Active: "A", Auth: "U", Data: "D", Idle: "I", Reset: "R", Error: "E", Closed: "C",
};

/** The states, in the order in which a connection may go through them. */
export const STATES = Object.keys(LETTERS);

/** A state as a coloured chip with its name. */
export function chip(state) {
  return element("span", { class: "chip", "data-state": state }, state);
}

/** The one letter by which a state is told where there is no room for its name. */
export function letter(state) {
  return LETTERS[state] ?? "·";
}

/** Seconds as people say them: 0.4 s, 12 s, 3 min, 2 h. */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const value = Math.max(0, seconds);
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.floor(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min`;
  if (value < 172800) return `${Math.floor(value / 3600)} h`;
  return `${Math.floor(value / 86400)} d`;
}

/** Milliseconds with as many digits as tell something. */
export function span(milliseconds) {
  if (milliseconds < 0.1) return `${Math.round(milliseconds * 1000)} µs`;
  if (milliseconds < 10) return `${milliseconds.toFixed(2)} ms`;
  if (milliseconds < 100) return `${milliseconds.toFixed(1)} ms`;
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60000) return `${(milliseconds / 1000).toFixed(2)} s`;
  return `${(milliseconds / 60000).toFixed(1)} min`;
}

/** The time of day of a moment, with milliseconds. */
export function clock(unixMilliseconds) {
  const moment = new Date(unixMilliseconds);
  return `${moment.toLocaleTimeString([], { hour12: false })}.${String(moment.getMilliseconds()).padStart(3, "0")}`;
}

/** A moment: the time of day, and the date if it was not today; today to the millisecond, where `isExact`. */
export function when(unixMilliseconds, isExact = true) {
  const moment = new Date(unixMilliseconds);
  const isToday = moment.toDateString() === new Date().toDateString();
  if (isToday) return isExact ? clock(unixMilliseconds) : moment.toLocaleTimeString([], { hour12: false });
  const date = { day: "numeric", month: "short", ...(moment.getFullYear() === new Date().getFullYear() ? {} : { year: "numeric" }) };
  return `${moment.toLocaleDateString([], date)} ${moment.toLocaleTimeString([], { hour12: false })}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString()} ${count === 1 ? one : many}`;
}

const tip = document.getElementById("tip");

/** Show `lines` beside `target` while it is hovered or focused. */
export function explain(target, lines) {
  const show = () => {
    tip.replaceChildren(...lines().map((line, index) => element(index === 0 ? "strong" : "span", {}, line)));
    tip.hidden = false;
    const box = target.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above < 4 ? box.bottom + 8 : above) + scrollY}px`;
  };
  const hide = () => { tip.hidden = true; };
  target.addEventListener("mouseenter", show);
  target.addEventListener("focus", show);
  target.addEventListener("mouseleave", hide);
  target.addEventListener("blur", hide);
}

addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
