// One trace as a waterfall: a row for each span, its events as marks on it, and all events by time below.

import { chip, element, explain, letter, span as spell } from "/draw.js";

const STATE_PIXELS = 18; // a mark and its gap
const STEP_PIXELS = 12; // an upstream's step has no letter
const LANES = 4; // beyond this, marks overlap: a row stays a row
const KINDS = { 1: "internal", 2: "server", 3: "client" };
const SHORT = {
  "smtp.connection": "connection", "smtp.transaction": "transaction", "smtp.delivery": "delivery", "smtp.spool": "queue",
};

/** Draw OTLP spans; `open(traceId)` follows a link. Gives the view, what to call once it is in the page, the duration and
 *  the number of events. */
export function waterfall(otlpSpans, open) {
  const spans = inTreeOrder(otlpSpans.map(read));
  const start = Math.min(...spans.map((each) => each.start));
  const end = Math.max(...spans.map((each) => each.end));
  const events = spans.flatMap((each) => each.events).sort((a, b) => a.at - b.at || a.sequence - b.sequence);
  const view = new Waterfall(spans, events, start, end, open);
  return { view: view.root, place: () => view.place(), milliseconds: end - start, events: events.length };
}

// Nanoseconds since 1970 need more than a double's 53 bits; differences do not.
let origin = 0n;

function read(otlp, index) {
  if (index === 0) origin = BigInt(otlp.startTimeUnixNano);
  const moment = (text) => Number(BigInt(text) - origin) / 1e6;
  const made = {
    id: otlp.spanId,
    parent: otlp.parentSpanId ?? "",
    name: otlp.name,
    kind: KINDS[otlp.kind] ?? "",
    hasFailed: otlp.status?.code === 2,
    start: moment(otlp.startTimeUnixNano),
    end: moment(otlp.endTimeUnixNano),
    attributes: attributesOf(otlp.attributes),
    links: (otlp.links ?? []).map((link) => ({ traceId: link.traceId, attributes: attributesOf(link.attributes) })),
  };
  made.events = otlp.events.map((event, sequence) => ({
    span: made, sequence, name: event.name, at: moment(event.timeUnixNano), attributes: attributesOf(event.attributes),
  }));
  return made;
}

function attributesOf(keyValues) {
  return Object.fromEntries((keyValues ?? []).map(({ key, value }) => [key, valueOf(value)]));
}

function valueOf(value) {
  if ("arrayValue" in value) return (value.arrayValue.values ?? []).map(valueOf).join(", ");
  return Object.values(value)[0];
}

function inTreeOrder(spans) {
  const known = new Set(spans.map((each) => each.id));
  const ordered = [];
  const walk = (parent, depth) => {
    const children = spans.filter((each) => (known.has(each.parent) ? each.parent : "") === parent);
    for (const each of children.sort((a, b) => a.start - b.start)) {
      each.depth = depth;
      ordered.push(each);
      walk(each.id, depth + 1);
    }
  };
  walk("", 0);
  return ordered;
}

/** What a row is about: a bounce must not look like one more attempt at its mail. */
function subject(each) {
  const kind = each.attributes["smtp.message.kind"] ?? "mail";
  return kind === "mail" ? SHORT[each.name] ?? each.name : kind.replaceAll("_", " ");
}

/** Which of them it is. */
function which(each) {
  const a = each.attributes;
  return a["smtp.upstream.name"] ?? a["smtp.spool.action"]?.replaceAll("_", " ") ?? a["smtp.transaction.number"] ?? a["smtp.listener"] ?? "";
}

/** How it ended, or who ended it. */
function ending(each) {
  const a = each.attributes;
  return a["smtp.outcome"] ?? a["smtp.close.reason"]?.replaceAll("_", " ") ?? (a["smtp.spool.operator"] ? `by ${a["smtp.spool.operator"]}` : "");
}

/** What an event is called: its state, or the last part of its name. */
function title(event) {
  return event.attributes["smtp.state"] ?? event.name.replace("smtp.upstream.", "").replace("smtp.", "");
}

/** What an event says beyond its name, in a few words. */
function words(event) {
  const a = event.attributes;
  const parts = [
    a["smtp.rcpt.address"] ?? a["smtp.rcpt.domain"], a["smtp.recipient.fate"],
    a["smtp.recipient.more"] && `${a["smtp.recipient.more"]} more recipients`,
    a["smtp.verb"], a["smtp.reply.code"], a["smtp.reply.enhanced_code"], a["smtp.reply.text"], a["smtp.failure.reason"],
    a["error.type"], event.name === "smtp.recipient" ? a["smtp.upstream.name"] : "", a["smtp.auth.mechanism"],
    a["tls.protocol.version"] && `TLS ${a["tls.protocol.version"]}`, a["tls.cipher"], a["smtp.reset.cause"],
    a["smtp.close.reason"]?.replaceAll("_", " "),
    a["smtp.transaction.recipient_count"] && `recipients: ${a["smtp.transaction.recipient_count"]}`,
    a["smtp.connection.messages"] && `messages: ${a["smtp.connection.messages"]}`,
  ];
  return parts.filter((part) => part !== undefined && part !== "" && part !== null).join(" · ");
}

function isError(event) {
  return title(event) === "Error" || event.name === "smtp.recipient" || Number(event.attributes["smtp.reply.code"]) >= 400;
}

class Waterfall {
  constructor(spans, events, start, end, open) {
    this.spans = spans;
    this.events = events;
    this.whole = [start, Math.max(end, start + 0.001)];
    this.window = this.whole;
    this.open = open;
    this.chart = element("div", { class: "waterfall", role: "group", "aria-label": "Waterfall" });
    this.details = element("div", { class: "details" });
    this.rows = new Map();
    this.marks = new Map();
    this.chart.addEventListener("keydown", (event) => this.moveAlong(event));
    new ResizeObserver(() => this.place()).observe(this.chart);
    this.root = element("div", {}, this.chart, this.details, this.table());
    this.build();
    this.select(this.events.find(isError) ?? null, this.spans.find((each) => each.hasFailed) ?? this.spans[0]);
  }

  build() {
    this.axis = element("div", { class: "axis", "aria-hidden": "true" });
    this.wholeButton = element("button", { type: "button", class: "link", hidden: true, onclick: () => this.zoom(this.whole) }, "Whole trace");
    this.chart.append(element("div", { class: "row axis-row" }, element("div", { class: "label" }, this.wholeButton), this.axis));
    for (const each of this.spans) this.chart.append(this.row(each));
    for (const [index, event] of this.events.entries()) this.marks.get(event).tabIndex = index === 0 ? 0 : -1;
  }

  row(each) {
    const [name, what, note] = [subject(each), which(each), ending(each)];
    const label = element("button", {
      type: "button", class: "label", "aria-label": `${name} ${what}, ${note}, ${spell(each.end - each.start)}${each.hasFailed ? ", failed" : ""}`,
      onclick: () => this.select(null, each), ondblclick: () => this.zoom([each.start, each.end]),
    }, element("span", { class: "span-name" }, name), element("span", { class: "faint" }, ` ${what}`));
    label.style.paddingInlineStart = `${0.5 + each.depth * 0.9}rem`;
    const bar = element("div", { class: "bar", "data-kind": each.kind, "data-failed": each.hasFailed });
    const time = element("span", { class: "bar-time" }, `${spell(each.end - each.start)}${note ? ` · ${note}` : ""}`);
    const track = element("div", { class: "track" }, bar, time);
    for (const event of each.events) {
      const mark = element("button", {
        type: "button", class: "mark", "data-state": event.attributes["smtp.state"] ?? "upstream", "data-error": isError(event),
        "aria-label": `${title(event)} at ${spell(event.at - this.whole[0])}${words(event) ? `: ${words(event)}` : ""}`,
        onclick: () => this.select(event, each), onmouseenter: () => this.light(event, true), onmouseleave: () => this.light(event, false),
      }, event.attributes["smtp.state"] ? letter(event.attributes["smtp.state"]) : "");
      explain(mark, () => [title(event), `+${spell(event.at - this.whole[0])}`, words(event)].filter(Boolean));
      this.marks.set(event, mark);
      track.append(mark);
    }
    const made = element("div", { class: "row", "data-failed": each.hasFailed }, label, track);
    this.rows.set(each, { made, label, track, bar, time });
    return made;
  }

  /** Put everything where its time is; called when the width or the window changes. */
  place() {
    const width = this.axis.clientWidth;
    if (width === 0) return;
    const [from, to] = this.window;
    const at = (moment) => ((moment - from) / (to - from)) * width;
    this.wholeButton.hidden = this.window === this.whole;
    this.axis.replaceChildren(...ticks(to - from, width).map((tick) => {
      const mark = element("span", {}, round(tick));
      mark.style.left = `${(tick / (to - from)) * width}px`;
      return mark;
    }));
    for (const [each, { track, bar, time }] of this.rows) {
      const left = Math.max(0, at(each.start));
      const right = Math.min(width, at(each.end));
      bar.hidden = right < 0 || left > width;
      bar.style.left = `${left}px`;
      bar.style.width = `${Math.max(3, right - left)}px`;
      const lanes = [];
      const lanePixels = each.events.some((event) => event.attributes["smtp.state"]) ? STATE_PIXELS : STEP_PIXELS;
      for (const event of each.events) {
        const mark = this.marks.get(event);
        const x = at(event.at);
        mark.hidden = x < -1 || x > width + 1;
        if (mark.hidden) continue;
        const free = lanes.findIndex((last) => x - last >= lanePixels);
        let lane = free === -1 ? lanes.length : free;
        if (lane >= LANES) lane = LANES - 1;
        lanes[lane] = x;
        mark.style.left = `${x}px`;
        mark.style.top = `${5 + lane * lanePixels}px`;
      }
      const height = Math.max(26, 8 + lanes.length * lanePixels);
      track.style.height = `${height}px`;
      // Beside the bar where there is room, else at its head above nothing: a bar across the row has none.
      const beside = right + 14;
      const room = width - beside > time.offsetWidth;
      time.style.left = room ? `${beside}px` : `${Math.max(0, Math.min(left - time.offsetWidth - 14, width - time.offsetWidth))}px`;
      time.classList.toggle("below", !room && left < time.offsetWidth + 14);
      if (time.classList.contains("below")) {
        time.style.left = `${Math.max(0, right - time.offsetWidth)}px`;
        time.style.top = `${height - 3}px`;
        track.style.height = `${height + 15}px`;
      } else time.style.top = "";
    }
  }

  zoom([from, to]) {
    const margin = from === this.whole[0] && to === this.whole[1] ? 0 : (to - from) * 0.04;
    this.window = margin === 0 ? this.whole : [from - margin, Math.max(to + margin, from + 0.001)];
    this.place();
  }

  moveAlong(pressed) {
    const from = this.events.findIndex((event) => this.marks.get(event) === document.activeElement);
    if (from === -1) return;
    const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: this.events.length - 1 }[pressed.key];
    if (to === undefined || this.events[to] === undefined) return;
    pressed.preventDefault();
    this.zoomTo(this.events[to]);
    this.marks.get(this.events[from]).tabIndex = -1;
    this.marks.get(this.events[to]).tabIndex = 0;
    this.marks.get(this.events[to]).focus();
  }

  zoomTo(event) {
    if (event.at < this.window[0] || event.at > this.window[1]) this.zoom(this.whole);
  }

  light(event, isLit) {
    this.lines.get(event).classList.toggle("lit", isLit);
    this.marks.get(event).classList.toggle("lit", isLit);
  }

  /** Show what is known of an event, or of a whole span. */
  select(event, each) {
    for (const [other, { made, label }] of this.rows) {
      made.classList.toggle("chosen", other === each);
      label.setAttribute("aria-pressed", String(event === null && other === each));
    }
    for (const [other, mark] of this.marks) {
      mark.setAttribute("aria-pressed", String(other === event));
      this.lines.get(other).classList.toggle("chosen", other === event);
    }
    const about = event ?? each;
    const facts = event === null
      ? { start: `+${spell(each.start - this.whole[0])}`, duration: spell(each.end - each.start), kind: each.kind, ...each.attributes }
      : { time: `+${spell(event.at - this.whole[0])}`, ...event.attributes };
    const terms = Object.entries(facts).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
    this.details.replaceChildren(
      element("h4", {}, event?.attributes["smtp.state"] ? chip(event.attributes["smtp.state"]) : null,
        element("span", { class: "mono" }, about.name),
        event === null && each.hasFailed ? element("span", { class: "verdict", "data-severity": "failed" }, "failed") : null,
        event === null && this.spans.length > 1 ? element("button", { type: "button", class: "link", onclick: () => this.zoom([each.start, each.end]) }, "Zoom to this span") : null),
      element("dl", {}, ...terms),
      ...(event === null ? each.links : []).map((link) => element("p", { class: "links" },
        `linked (${link.attributes["smtp.link.type"] ?? "link"}): `,
        element("button", { type: "button", class: "link mono", onclick: () => this.open(link.traceId) }, link.traceId))),
    );
  }

  /** All events by time: the same story for who cannot see the picture. */
  table() {
    this.lines = new Map();
    const body = element("tbody");
    let before = null;
    for (const event of this.events) {
      const state = event.attributes["smtp.state"];
      const line = element("tr", { onclick: () => this.select(event, event.span), "data-error": isError(event) },
        element("td", { class: "number mono" }, `+${spell(event.at - this.whole[0])}`),
        element("td", { class: "number mono faint" }, before === null ? "" : `+${spell(event.at - before)}`),
        element("td", {}, SHORT[event.span.name] ?? event.span.name),
        element("th", { scope: "row" }, state ? chip(state) : element("span", { class: "chip", "data-state": "upstream" }, title(event))),
        element("td", { class: isError(event) ? "bad" : "" }, words(event)));
      line.addEventListener("mouseenter", () => this.light(event, true));
      line.addEventListener("mouseleave", () => this.light(event, false));
      this.lines.set(event, line);
      body.append(line);
      before = event.at;
    }
    return element("div", { class: "scroll events", tabindex: "0", role: "group", "aria-label": "All events by time" },
      element("table", {},
        element("thead", {}, element("tr", {},
          ...["At", "Since last", "Span", "Event", "What"].map((name, index) => element("th", { scope: "col", class: index < 2 ? "number" : "" }, name)))),
        body));
  }
}

/** Round numbers between 0 and `length`, as many as `width` pixels have room for. */
function ticks(length, width) {
  const rough = length / Math.max(1, Math.floor(width / 95));
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const room = length - (48 / width) * length;
  return Array.from({ length: Math.floor(length / step) + 1 }, (_, index) => index * step).filter((tick) => tick <= room);
}

/** A round number of milliseconds without needless zeros. */
function round(milliseconds) {
  const [value, unit] = milliseconds >= 60000 ? [milliseconds / 60000, "min"] : milliseconds >= 1000 ? [milliseconds / 1000, "s"]
    : milliseconds >= 1 || milliseconds === 0 ? [milliseconds, "ms"] : [milliseconds * 1000, "µs"];
  return milliseconds === 0 ? "0" : `${Number(value.toPrecision(4))} ${unit}`;
}
