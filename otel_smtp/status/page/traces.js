// The list of recent traces, the search over it, and the trace that is open. What is shown is in the address, so that a
// view can be sent to a colleague; each trace that is opened is an entry of the history.

import { age, element, letter, plural, reconcile, span, when, write } from "/draw.js";
import { waterfall } from "/waterfall.js";

const form = document.getElementById("search");
const query = document.getElementById("query");
const list = document.getElementById("trace-list");
const count = document.getElementById("traces-count");
const notes = document.getElementById("traces-notes");
const empty = document.getElementById("traces-empty");
const pages = document.getElementById("trace-pages");
const newer = document.getElementById("newer");
const older = document.getElementById("older");
const place = document.getElementById("trace-place");
const panes = document.getElementById("panes");
const pane = document.getElementById("trace");
const nothing = pane.firstElementChild;

const VERDICT = { failed: "failed", refused: "refused", aborted: "aborted", ok: "ok" };
const QUIET_MILLISECONDS = 150; // typing: one search when the fingers rest
const PAGE = 100; // traces that the gateway gives at a time
const narrow = matchMedia("(max-width: 62rem)"); // as in the style sheet: an open trace covers all else

let traceUrl = "";
let opened = "";
let openedSpans = 0;
let coming = ""; // the trace that was asked for and has not come
let asked = 0;
let skipped = 0; // traces before the page that is shown
let until = 0; // as of when, for pages after the first: what comes meanwhile must not push them on

/** Begin; `template` is where a backend shows a trace, with {trace_id} in it. */
export function startTraces(template) {
  traceUrl = template;
  read();
  form.addEventListener("submit", (event) => { event.preventDefault(); first(); });
  form.addEventListener("change", first);
  let timer = 0;
  query.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(first, QUIET_MILLISECONDS);
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step !== undefined && moveFocus(step)) event.preventDefault();
  });
  newer.addEventListener("click", () => turn(-PAGE));
  older.addEventListener("click", () => turn(PAGE));
  narrow.addEventListener("change", cover);
  // Back, forward, or an address that was typed.
  addEventListener("popstate", () => {
    const before = opened;
    read();
    search();
    if (opened && opened !== before) show();
    else if (!opened && before) closed(before);
  });
  search();
  if (opened) show();
}

/** Ask for the list again: something was sent, or typed. */
export async function search() {
  asked += 1;
  const mine = asked;
  const settings = new URLSearchParams({ q: query.value.trim() });
  if (form.elements.only.value === "errors") settings.set("only", "errors");
  if (skipped > 0) {
    settings.set("skip", String(skipped));
    settings.set("until", String(until));
  }
  const answer = await fetch(`/api/traces?${settings}`).catch(() => null); // the stream tells that the gateway is gone
  if (!answer?.ok || mine !== asked) return; // an answer that was overtaken would undo the newer one
  const found = await answer.json();
  if (skipped === 0) until = found.traces[0]?.end_unix_milliseconds ?? 0;
  reconcile(list, found.traces, (trace) => trace.trace_id, makeItem, fillItem);
  empty.hidden = found.traces.length > 0;
  write(empty, found.held > 0 ? "No trace matches." : "No trace yet. Send a mail through the gateway.");
  const verdicts = Object.entries(found.by_severity).filter(([, number]) => number > 0);
  write(count, verdicts.map(([name, number]) => `${number.toLocaleString()} ${VERDICT[name]}`).join(" · ") || "none");
  write(notes, [...found.notes,
    `All traces since ${when(found.complete_since_unix_milliseconds, false)} are here; of those before, failures.`].join(" · "));
  pages.hidden = found.found <= PAGE;
  newer.disabled = skipped === 0;
  older.disabled = skipped + PAGE >= found.found;
  write(place, `${(skipped + 1).toLocaleString()}–${(skipped + found.traces.length).toLocaleString()} of ${found.found.toLocaleString()}`);
  const summary = found.traces.find((trace) => trace.trace_id === opened);
  // What is on its way is not asked for again: a second drawing would take the place of what is being read.
  if (summary !== undefined && coming !== opened && summary.spans !== openedSpans) show();
}

/** The first page of what is asked for now. */
function first() {
  skipped = 0;
  history.replaceState(null, "", address());
  search();
}

function turn(step) {
  skipped = Math.max(0, skipped + step);
  list.parentElement.scrollTop = 0;
  search();
}

/** Where the search field is. */
export function focusSearch() {
  query.focus();
  query.select();
}

/** Move to another trace of the list; where one is open, open it in its place. */
export function step(by) {
  const focused = moveFocus(by);
  if (focused && opened) {
    opened = focused.parentElement.dataset.key;
    history.replaceState(null, "", address());
    show();
  }
}

function moveFocus(by) {
  const items = [...list.querySelectorAll("button")];
  let at = items.indexOf(document.activeElement);
  if (at === -1) at = items.findIndex((item) => item.parentElement.dataset.key === opened);
  const next = items[at === -1 ? 0 : at + by];
  next?.focus();
  return next;
}

function makeItem(trace) {
  const button = element("button", { type: "button", class: "trace-item", onclick: () => open(trace.trace_id) });
  return element("li", {}, button);
}

function fillItem(item, trace) {
  const button = item.firstChild;
  button.setAttribute("aria-pressed", String(trace.trace_id === opened));
  const seen = JSON.stringify(trace);
  if (button.seen === seen) return;
  button.seen = seen;
  const to = trace.domains.join(", ") || trace.senders.map((sender) => `from ${sender}`).join(", ");
  // A code without words stands beside the verdict already.
  const words = trace.words.find((each) => !/^[\d. ]+$/.test(each));
  const verdict = trace.outcomes.map((outcome) => outcome.replaceAll("_", " ")).join(", ") || trace.error_types.join(", ") || "no mail";
  button.dataset.severity = trace.severity;
  button.title = [
    [verdict, to].filter(Boolean).join(" → "), ...trace.words,
    `${new Date(trace.start_unix_milliseconds).toLocaleString()}, ${span(trace.duration_milliseconds)}`,
  ].join("\n");
  button.replaceChildren(...[
    element("span", { class: "verdict", "data-severity": trace.severity }, verdict),
    element("span", { class: "codes mono" }, trace.replies.join(" ")),
    element("span", { class: "to" }, to || trace.clients.join(", ") || "–"),
    element("span", { class: "faint number" }, span(trace.duration_milliseconds)),
    words === undefined ? null : element("span", { class: "words" }, words),
    element("span", { class: "steps", "aria-hidden": "true" },
      ...trace.states.slice(0, 24).map((state) => element("i", { "data-state": state }, letter(state)))),
    element("span", { class: "faint number" }, when(trace.end_unix_milliseconds)),
  ].filter((each) => each !== null));
}

/** Open a trace by its id; going back closes it. */
export function open(traceId) {
  const isSame = opened === traceId;
  opened = traceId;
  if (!isSame) history.pushState(null, "", address());
  return show(true);
}

/** Close the trace that is open; false: none is. */
export function close() {
  if (!opened) return false;
  const before = opened;
  opened = "";
  history.pushState(null, "", address());
  closed(before);
  return true;
}

function closed(before) {
  openedSpans = 0;
  pane.replaceChildren(nothing);
  mark();
  cover();
  list.querySelector(`[data-key="${CSS.escape(before)}"] button`)?.focus();
}

async function show(isFocused = false) {
  const traceId = opened;
  coming = traceId;
  mark();
  let found;
  try {
    const answer = await fetch(`/api/traces/${encodeURIComponent(traceId)}`);
    found = answer.ok ? await answer.json() : null;
  } finally {
    if (coming === traceId) coming = "";
  }
  if (opened !== traceId) return;
  const shut = element("button", { type: "button", class: "shut", "aria-label": "Close the trace", onclick: close }, "✕");
  if (found === null) {
    openedSpans = 0;
    pane.replaceChildren(shut, element("p", { class: "empty" }, "This trace has left the gateway's memory."), links(traceId));
    cover();
    return;
  }
  const spans = found.resourceSpans.flatMap((each) => each.scopeSpans.flatMap((scope) => scope.spans));
  openedSpans = spans.length;
  const drawn = waterfall(spans, open);
  const started = new Date(Number(BigInt(spans[0].startTimeUnixNano) / 1000000n));
  const title = element("h3", { class: "mono", tabindex: "-1" }, traceId);
  pane.replaceChildren(
    element("header", { class: "trace-head" }, shut, title,
      element("p", { class: "faint" },
        `${started.toLocaleString()} · ${span(drawn.milliseconds)} · ${plural(spans.length, "span")} · ${plural(drawn.events, "event")} · `
        + `${age((Date.now() - started) / 1000)} ago`),
      links(traceId)),
    drawn.view,
  );
  cover();
  if (isFocused && narrow.matches) title.focus();
  drawn.place(); // before it is seen: until now it had no width
}

/** Tell in the list which trace is open. */
function mark() {
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.parentElement.dataset.key === opened));
  }
}

/** Where there is no room beside the list, an open trace lies over everything, and nothing else can be reached. */
function cover() {
  const isOver = opened !== "" && narrow.matches;
  panes.classList.toggle("covered", isOver);
  for (let inside = pane; inside !== document.body; inside = inside.parentElement) {
    for (const other of inside.parentElement.children) {
      if (other !== inside && other.id !== "tip" && other.localName !== "dialog") other.inert = isOver;
    }
  }
}

function links(traceId) {
  const row = element("p", { class: "links" });
  const outside = outsideUrl(traceId);
  if (outside) row.append(element("a", { href: outside, target: "_blank", rel: "noopener noreferrer" }, "Open in the tracing backend ↗"));
  const copy = element("button", { type: "button", class: "link" }, "Copy the trace id");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(traceId);
    write(copy, "Copied");
    setTimeout(() => write(copy, "Copy the trace id"), 1500);
  });
  row.append(copy, element("a", { href: `/api/traces/${encodeURIComponent(traceId)}`, download: `trace-${traceId}.json` }, "Save as OTLP JSON"));
  return row;
}

function outsideUrl(traceId) {
  if (!traceUrl) return "";
  const url = URL.parse(traceUrl.replaceAll("{trace_id}", encodeURIComponent(traceId)));
  return url !== null && ["http:", "https:"].includes(url.protocol) ? url.href : "";
}

/** What the address says is asked for. */
function read() {
  const settings = new URLSearchParams(location.hash.slice(1));
  query.value = settings.get("q") ?? "";
  form.elements.only.value = settings.get("only") === "errors" ? "errors" : "all";
  opened = settings.get("trace") ?? "";
  skipped = 0;
}

/** The address that says what is asked for. */
function address() {
  const settings = new URLSearchParams();
  if (query.value.trim()) settings.set("q", query.value.trim());
  if (form.elements.only.value === "errors") settings.set("only", "errors");
  if (opened) settings.set("trace", opened);
  return settings.size ? `#${settings}` : location.pathname;
}
