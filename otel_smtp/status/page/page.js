// The page of one gateway: what the stream tells is shown at once; traces and queue are asked for when they change.

import { age, element, reconcile, when, write } from "/draw.js";
import { showConnections, tickConnections } from "/connections.js";
import { startKeys } from "/keys.js";
import { showQueue, showUpstreams, startActions } from "/places.js";
import { open, search, startTraces } from "/traces.js";

const TICK_MILLISECONDS = 250;
const TRACES_MILLISECONDS = 1000; // the list is asked for at most this often
const QUEUE_MILLISECONDS = 5000;

const readiness = document.getElementById("readiness");
const totals = document.getElementById("totals");

let clockOffset = 0; // gateway's clock minus ours, milliseconds
let startedAt = Date.now();
let tracesVersion = -1;
let tracesTimer = 0;

async function start() {
  const status = await (await fetch("/api/status")).json();
  clockOffset = status.now_unix_milliseconds - Date.now();
  startedAt = Date.now() - status.uptime_seconds * 1000;
  const { hostname, ...facts } = status.about;
  if (hostname) {
    write(document.getElementById("name"), hostname);
    document.title = `${hostname} – otel-smtp`;
  }
  document.getElementById("about").replaceChildren(
    ...Object.entries(facts).map(([what, value]) => element("span", {}, `${what} `, element("b", {}, value))),
    element("span", {}, "up ", element("b", { id: "uptime" }, age(status.uptime_seconds))),
  );
  write(document.getElementById("totals-since"), `since ${when(startedAt, false)}, when the gateway started`);
  startTraces(status.trace_url);
  startKeys();
  if (status.has_queue) {
    document.getElementById("queue").hidden = false;
    if (status.may_act) startActions();
    watchQueue();
  }
  setInterval(tick, TICK_MILLISECONDS);
  listen();
}

function listen() {
  const stream = new EventSource("/api/stream");
  stream.addEventListener("picture", (event) => show(JSON.parse(event.data)));
  // The browser tries again by itself; an answer that is no stream (a gateway that drains) ends that.
  stream.addEventListener("error", () => {
    setReadiness("lost", "Connection lost, trying again…");
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  });
}

function show(picture) {
  const reasons = Object.entries(picture.not_ready);
  const silent = picture.silent_processes ?? [];
  const unknown = silent.length === 0 ? "" : `; nothing is known of process ${silent.join(" and ")}`;
  if (reasons.length === 0) setReadiness("ready", `Ready${unknown}`);
  else setReadiness("not-ready", `Not ready: ${reasons.map(([check, reason]) => `${check}: ${reason}`).join("; ")}${unknown}`);
  showTotals(picture.counters);
  showConnections(picture.connections, picture.counters.connections_open);
  showUpstreams(picture.upstreams);
  tick();
  if (picture.traces_version !== tracesVersion) {
    tracesVersion = picture.traces_version;
    if (tracesTimer === 0) {
      search();
      tracesTimer = setTimeout(() => {
        tracesTimer = 0;
        search();
      }, TRACES_MILLISECONDS);
    }
  }
}

function setReadiness(state, text) {
  readiness.dataset.state = state;
  write(readiness, text);
}

function showTotals(counters) {
  const outcomes = counters.transactions;
  const refused = Object.values(counters.connections_refused).reduce((sum, each) => sum + each, 0);
  const tiles = [
    ["connections open now", counters.connections_open, ""],
    ["connections accepted", counters.connections_accepted, ""],
    ["connections turned away", refused, "warn"],
    ["mails relayed", outcomes.relayed ?? 0, "good"],
    ["mails relayed in part", outcomes.partly_relayed ?? 0, "warn"],
    ["mails queued", outcomes.queued ?? 0, ""],
    ["mails deferred", outcomes.deferred ?? 0, "warn"],
    ["mails refused", outcomes.refused ?? 0, "warn"],
    ["mails aborted by clients", outcomes.aborted ?? 0, ""],
    ["mails whose outcome is unknown", outcomes.unknown ?? 0, "alarm"],
  ];
  reconcile(totals, tiles, ([name]) => name,
    ([name]) => element("li", {}, element("b"), element("span", {}, name)),
    (tile, [, value, tone]) => {
      write(tile.firstChild, value.toLocaleString());
      tile.dataset.tone = value > 0 ? tone : "";
    });
}

function tick() {
  tickConnections(Date.now() + clockOffset);
  write(document.getElementById("uptime"), age((Date.now() - startedAt) / 1000));
}

async function watchQueue() {
  const answer = await fetch("/api/queue").catch(() => null); // the stream tells that the gateway is gone
  if (answer?.ok) showQueue((await answer.json()).queue, open);
  setTimeout(watchQueue, QUEUE_MILLISECONDS);
}

start();
