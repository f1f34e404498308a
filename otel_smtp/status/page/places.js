// Where mail goes: the upstreams with their pools, and the queue.

import { age, element, plural, reconcile, write } from "/draw.js";

const upstreamList = document.getElementById("upstreams");
const upstreamsEmpty = document.getElementById("upstreams-empty");
const queueBody = document.querySelector("#queue-messages tbody");
const queueEmpty = document.getElementById("queue-empty");
const queueCount = document.getElementById("queue-count");
const sharing = document.getElementById("sharing");
const gatewayList = document.getElementById("gateways");
const departureList = document.getElementById("departures");
const gatewayHead = document.getElementById("queue-gateway");

const BREAKER = { closed: "in use", open: "not tried", "half-open": "one probe" };
const TLS = { off: "in clear", starttls: "STARTTLS", implicit: "TLS" };

/** Show the upstreams in their order of preference. */
export function showUpstreams(upstreams) {
  upstreamsEmpty.hidden = upstreams.length > 0;
  reconcile(upstreamList, upstreams, (each) => each.name, () => element("li"), fillUpstream);
}

function fillUpstream(item, facts) {
  const seen = JSON.stringify(facts);
  if (item.seen === seen) return;
  item.seen = seen;
  const free = Math.max(0, facts.limit - facts.busy - facts.idle);
  const words = `${facts.busy} busy, ${facts.idle} idle, ${free} free of ${facts.limit} connections`;
  const meter = element("div", { class: "meter", role: "img", "aria-label": words, title: words });
  for (const [kind, size] of [["busy", facts.busy], ["idle", facts.idle], ["free", free]]) {
    const part = element("span", { "data-part": kind });
    part.style.flexGrow = String(size);
    if (size > 0) meter.append(part);
  }
  let retry = BREAKER[facts.breaker] ?? facts.breaker;
  if (facts.breaker === "open" && facts.retry_seconds !== null) retry += `, again in ${age(facts.retry_seconds)}`;
  item.replaceChildren(
    element("div", { class: "upstream-head" },
      element("strong", {}, facts.name),
      element("span", { class: "faint mono" }, facts.address),
      element("span", { class: "tag" }, TLS[facts.tls] ?? facts.tls),
      element("span", { class: "breaker", "data-breaker": facts.breaker }, retry)),
    meter,
    element("p", { class: "faint" },
      `${facts.busy} busy · ${facts.idle} idle · ${facts.limit} at most`,
      facts.waiting ? ` · ${plural(facts.waiting, "transaction waits", "transactions wait")}` : "",
      facts.last_success_seconds === null ? "" : ` · last success ${age(facts.last_success_seconds)} ago`,
      facts.last_failure_seconds === null ? null : element("span", { class: "bad" },
        ` · last failure ${age(facts.last_failure_seconds)} ago${facts.last_failure ? ` (${facts.last_failure})` : ""}`)),
  );
}

/** Show who shares the queue: those who live, those who are silent, and those who have gone. */
function showSharing(queue) {
  sharing.hidden = queue.gateways.length === 0;
  gatewayHead.hidden = sharing.hidden;
  reconcile(gatewayList, queue.gateways, (each) => each.id, () => element("li"), (item, facts) => {
    const isSilent = facts.alive_seconds <= 0;
    item.replaceChildren(
      element("strong", { class: "mono" }, facts.name),
      ...(facts.is_this ? [element("span", { class: "tag" }, "this one")] : []),
      element("span", { class: "beat", "data-beat": isSilent ? "silent" : "lives" },
        isSilent ? `silent, its lease ended ${age(-facts.alive_seconds)} ago` : `lives, lease for ${age(facts.alive_seconds)}`),
      element("span", { class: "faint" }, `${facts.delivering} delivering · up ${age(facts.up_seconds)} · ${facts.version}`));
  });
  departureList.hidden = queue.departures.length === 0;
  reconcile(departureList, queue.departures, (each) => each.id, () => element("li"), (item, facts) => {
    const isDead = facts.silent_seconds !== null;
    item.dataset.gone = isDead ? "dead" : "left";
    item.replaceChildren(element("b", { class: "mono" }, facts.name), isDead
      ? ` was silent for ${age(facts.silent_seconds)}: ${facts.found_by} took over, and ${plural(facts.deliveries, "delivery goes on", "deliveries go on")}, ${age(facts.ago_seconds)} ago`
      : ` left, ${age(facts.ago_seconds)} ago`);
  });
}

/** Show the queue; `open(traceId)` opens a trace. */
export function showQueue(queue, open) {
  shown = { queue, open };
  const states = Object.entries(queue.counts).map(([state, number]) => `${number.toLocaleString()} ${state}`);
  const oldest = queue.oldest_age_seconds === null ? [] : [`oldest ${age(queue.oldest_age_seconds)}`];
  write(queueCount, [...states, ...oldest].join(" · "));
  queueEmpty.hidden = queue.messages.length > 0;
  queueBody.parentElement.hidden = queue.messages.length === 0;
  actionsHead.hidden = token === "";
  showSharing(queue);
  const isShared = queue.gateways.length > 0;
  reconcile(queueBody, queue.messages, (each) => each.spool_id, () => element("tr"), (row, facts) => {
    const seen = JSON.stringify([facts, token === "", isShared]);
    if (row.seen === seen || row.contains(document.activeElement)) return; // a button must not vanish under a finger
    row.seen = seen;
    row.replaceChildren(...[
      element("th", { scope: "row", class: "mono" }, facts.trace_id === null ? facts.spool_id
        : element("button", { class: "link mono", type: "button", onclick: () => open(facts.trace_id) }, facts.spool_id)),
      element("td", {}, facts.state),
      element("td", {}, facts.domains.join(", ") || plural(facts.recipients, "recipient")),
      isShared ? element("td", { class: "mono" }, facts.gateways.join(", ") || "–",
        facts.held_seconds === null ? null : element("span", { class: "faint" }, ` for ${age(facts.held_seconds)}`)) : null,
      element("td", { class: "number" }, age(facts.age_seconds)),
      element("td", { class: "number" }, String(facts.attempts)),
      element("td", { class: "number" }, facts.next_attempt_seconds === null ? "–" : age(facts.next_attempt_seconds)),
      element("td", { class: "reason" }, facts.last_reply ?? "–"),
      token === "" ? null : actionsOf(facts),
    ].filter((each) => each !== null));
  });
}

// What an operator may do -------------------------------------------------------------------------------------------

const unlock = document.getElementById("unlock");
const tokenDialog = document.getElementById("token");
const tokenText = document.getElementById("token-text");
const giveUp = document.getElementById("give-up");
const told = document.getElementById("queue-told");
const actionsHead = document.getElementById("queue-actions");
const DONE = { retry: "is attempted now", hold: "is held", release: "is released", expire: "is given up" };

let token = ""; // in this page's memory alone
let shown = null;
let sure = ""; // the message that is about to be given up

/** Offer the actions, behind a token. */
export function startActions() {
  unlock.hidden = false;
  unlock.addEventListener("click", () => {
    if (token === "") tokenDialog.showModal();
    else setToken("");
  });
  tokenDialog.addEventListener("close", () => {
    if (tokenDialog.returnValue === "unlock") setToken(tokenText.value.trim());
    tokenText.value = "";
  });
  giveUp.addEventListener("close", () => { if (giveUp.returnValue === "expire") act("expire", sure); });
}

function setToken(text) {
  token = text;
  write(unlock, token === "" ? "Unlock actions…" : "Lock actions");
  if (shown !== null) showQueue(shown.queue, shown.open);
}

function actionsOf(facts) {
  const button = (command, name, onclick) => element("button",
    { type: "button", class: "action", "aria-label": `${name} ${facts.spool_id}`, onclick: onclick ?? (() => act(command, facts.spool_id)) }, name);
  return element("td", { class: "actions" },
    button("retry", "Retry"),
    facts.state === "held" ? button("release", "Release") : button("hold", "Hold"),
    button("expire", "Give up", () => {
      sure = facts.spool_id;
      write(document.getElementById("give-up-what"), `${sure} is not attempted any more; its sender is told by a bounce, as the settings say.`);
      giveUp.returnValue = "";
      giveUp.showModal();
    }));
}

async function act(command, id) {
  const answer = await fetch(`/api/queue/${command}`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-otel-smtp-queue-token": token },
    body: JSON.stringify({ ids: [id] }),
  }).catch(() => null);
  const found = await answer?.json().catch(() => null);
  const problem = found?.error ?? found?.messages?.[0]?.error ?? (answer?.ok ? "" : "the gateway does not answer");
  if (answer?.status === 403) setToken("");
  const changed = found?.messages?.[0]?.changed;
  write(told, problem ? `Not done: ${problem}` : changed ? `${id} ${DONE[command]}` : `${id}: nothing to be done`);
  document.activeElement?.blur(); // its row is drawn again
  const queue = await fetch("/api/queue").catch(() => null);
  if (queue?.ok && shown !== null) showQueue((await queue.json()).queue, shown.open);
}
