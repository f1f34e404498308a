// The list of recent traces, the search over it, and the trace that is open.

import { age, clock, element, letter, plural, reconcile, span, write } from "/draw.js";
import { waterfall } from "/waterfall.js";

const form = document.getElementById("search");
const query = document.getElementById("query");
const list = document.getElementById("trace-list");
const count = document.getElementById("traces-count");
const empty = document.getElementById("traces-empty");
const pane = document.getElementById("trace");

const VERDICT = { failed: "failed", refused: "refused", ok: "ok" };
const QUIET_MILLISECONDS = 150; // typing: one search when the fingers rest

let traceUrl = "";
let opened = "";
let openedSpans = 0;
let coming = ""; // the trace that was asked for and has not come
let asked = 0;

/** Begin; `template` is where a backend shows a trace, with {trace_id} in it. */
export function startTraces(template) {
  traceUrl = template;
  const settings = new URLSearchParams(location.hash.slice(1));
  query.value = settings.get("q") ?? "";
  if (settings.get("order") === "newest") form.elements.order.value = "newest";
  form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
  form.addEventListener("change", search);
  let timer = 0;
  query.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, QUIET_MILLISECONDS);
  });
  list.addEventListener("keydown", moveFocus);
  addEventListener("hashchange", () => {
    const wanted = new URLSearchParams(location.hash.slice(1)).get("trace") ?? "";
    if (wanted && wanted !== opened) open(wanted);
  });
  search();
  if (settings.get("trace")) open(settings.get("trace"));
}

/** Ask for the list again: something was sent, or typed. */
export async function search() {
  asked += 1;
  const mine = asked;
  const settings = new URLSearchParams({ q: query.value.trim(), order: form.elements.order.value });
  remember();
  const answer = await fetch(`/api/traces?${settings}`);
  if (!answer.ok || mine !== asked) return; // an answer that was overtaken would undo the newer one
  const found = await answer.json();
  reconcile(list, found.traces, (trace) => trace.trace_id, makeItem, fillItem);
  empty.hidden = found.found > 0;
  write(empty, found.held > 0 ? "No trace matches." : "No trace yet. Send a mail through the gateway.");
  const verdicts = Object.entries(found.by_severity).filter(([, number]) => number > 0);
  const shown = found.found > found.traces.length ? `${found.traces.length} of ${found.found.toLocaleString()} shown · ` : "";
  write(count, shown + (verdicts.map(([name, number]) => `${number.toLocaleString()} ${VERDICT[name]}`).join(" · ") || "none"));
  const summary = found.traces.find((trace) => trace.trace_id === opened);
  // What is on its way is not asked for again: a second drawing would take the place of what is being read.
  if (summary !== undefined && coming !== opened && summary.spans !== openedSpans) open(opened);
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
  const verdict = trace.outcomes.join(", ") || trace.error_types.join(", ") || "no mail";
  button.title = [verdict, to].filter(Boolean).join(" → ");
  button.replaceChildren(
    element("span", { class: "verdict", "data-severity": trace.severity }, verdict),
    element("span", { class: "codes mono" }, trace.replies.join(" ")),
    element("span", { class: "to" }, to || trace.clients.join(", ") || "–"),
    element("span", { class: "faint number" }, span(trace.duration_milliseconds)),
    element("span", { class: "steps", "aria-hidden": "true" },
      ...trace.states.slice(0, 24).map((state) => element("i", { "data-state": state }, letter(state)))),
    element("span", { class: "faint number" }, clock(trace.start_unix_milliseconds)),
  );
}

function moveFocus(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step === undefined) return;
  const items = [...list.querySelectorAll("button")];
  const next = items[items.indexOf(document.activeElement) + step];
  if (next) { next.focus(); event.preventDefault(); }
}

/** Open a trace by its id. */
export async function open(traceId) {
  opened = traceId;
  coming = traceId;
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.parentElement.dataset.key === traceId));
  }
  remember();
  let found;
  try {
    const answer = await fetch(`/api/traces/${encodeURIComponent(traceId)}`);
    found = answer.ok ? await answer.json() : null;
  } finally {
    if (coming === traceId) coming = "";
  }
  if (opened !== traceId) return;
  if (found === null) {
    openedSpans = 0;
    pane.replaceChildren(element("p", { class: "empty" }, "This trace has left the gateway's memory."), links(traceId));
    return;
  }
  const spans = found.resourceSpans.flatMap((each) => each.scopeSpans.flatMap((scope) => scope.spans));
  openedSpans = spans.length;
  const drawn = waterfall(spans, open);
  const started = new Date(Number(BigInt(spans[0].startTimeUnixNano) / 1000000n));
  pane.replaceChildren(
    element("header", { class: "trace-head" },
      element("h3", { class: "mono" }, traceId),
      element("p", { class: "faint" },
        `${started.toLocaleString()} · ${span(drawn.milliseconds)} · ${plural(spans.length, "span")} · ${plural(drawn.events, "event")} · `
        + `${age((Date.now() - started) / 1000)} ago`),
      links(traceId)),
    drawn.view,
  );
  drawn.place(); // before it is seen: until now it had no width
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

function remember() {
  const settings = new URLSearchParams();
  if (query.value.trim()) settings.set("q", query.value.trim());
  if (form.elements.order.value !== "errors") settings.set("order", form.elements.order.value);
  if (opened) settings.set("trace", opened);
  const hash = settings.size ? `#${settings}` : "";
  if (location.hash !== hash) history.replaceState(null, "", hash || location.pathname);
}
