// What the keyboard does beyond the browser's own: search, moving through the list, closing, and telling all this.

import { chip, element, letter, STATES } from "/draw.js";
import { close, focusSearch, step } from "/traces.js";

const dialog = document.getElementById("keys");
const legend = document.getElementById("legend");

const KEYS = {
  "/": focusSearch,
  j: () => step(1),
  k: () => step(-1),
  "?": tell,
};

/** Begin to listen. */
export function startKeys() {
  legend.replaceChildren(...STATES.map((state) => element("li", {}, element("i", { "data-state": state }, letter(state)), ` ${state}`)));
  document.getElementById("show-keys").addEventListener("click", tell);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") !== null) return;
    const isTyping = event.target.matches("input:not([type=radio]), textarea, select");
    if (event.key === "Escape") {
      if (!isTyping) close();
      else {
        event.preventDefault(); // some browsers would empty the field
        event.target.blur();
      }
    } else if (!isTyping && KEYS[event.key] !== undefined) {
      event.preventDefault();
      KEYS[event.key]();
    }
  });
}

function tell() {
  dialog.showModal();
}
