// The table of open connections. The stream brings points in time; ages are worked out here, a few times a second.

import { age, chip, clock, element, explain, letter, plural, reconcile, write } from "/draw.js";

const body = document.querySelector("#connections tbody");
const empty = document.getElementById("connections-empty");
const count = document.getElementById("connections-count");

/** Show `connections`; `total` counts also those that the page does not hold. */
export function showConnections(connections, total) {
  reconcile(body, connections, (row) => row.id, makeRow, fillRow);
  empty.hidden = connections.length > 0;
  body.parentElement.hidden = connections.length === 0;
  write(count, total > connections.length ? `${connections.length} of ${total.toLocaleString()} open` : `${total} open`);
}

/** Let the ages tick; `now` is the gateway's clock in milliseconds. */
export function tickConnections(now) {
  for (const row of body.children) {
    write(row.cells[2], age((now - row.facts.since_unix_milliseconds) / 1000));
    write(row.cells[9], age((now - row.facts.opened_unix_milliseconds) / 1000));
  }
}

function makeRow() {
  const row = element("tr");
  row.append(element("th", { scope: "row" }));
  for (let index = 1; index < 10; index += 1) {
    row.append(element("td", { class: [2, 7, 8, 9].includes(index) ? "number" : "" }));
  }
  return row;
}

function fillRow(row, facts) {
  const before = row.facts;
  row.facts = facts;
  if (before !== undefined && JSON.stringify(before) === JSON.stringify(facts)) return;
  const [client, state, , path, listener, tls, login, mails, errors] = row.cells;
  client.replaceChildren(
    element("span", { class: "mono" }, facts.peer || "(not shown)"),
    facts.hello ? element("span", { class: "faint" }, ` ${facts.hello}`) : null,
  );
  client.title = facts.hello ? `calls itself ${facts.hello}` : "";
  if (state.firstChild?.textContent !== facts.state) {
    state.replaceChildren(chip(facts.state));
    if (before !== undefined) state.firstChild.classList.add("fresh");
  }
  path.replaceChildren(steps(facts.path));
  const name = facts.protocol === "smtp" ? facts.listener : `${facts.listener} (${facts.protocol})`;
  write(listener, facts.worker === undefined ? name : `${name} · process ${facts.worker}`);
  write(tls, facts.tls === null ? "–" : facts.tls.version);
  tls.title = facts.tls === null ? "no TLS" : facts.tls.cipher;
  write(login, facts.auth ?? "–");
  write(mails, String(facts.messages));
  write(errors, String(facts.errors));
  errors.classList.toggle("bad", facts.errors > 0);
}

function steps(path) {
  const words = path.map((step) => (step.code ? `${step.state} ${step.code}` : step.state)).join(", ");
  const strip = element("span", { class: "steps", role: "img", "aria-label": words });
  strip.append(...path.map((step) => element("i", { "data-state": step.state }, letter(step.state))));
  explain(strip, () => [
    plural(path.length, "step"),
    ...path.slice(-8).map((step) => `${clock(step.at_unix_milliseconds)}  ${step.state} ${step.code ?? ""}`),
  ]);
  return strip;
}
