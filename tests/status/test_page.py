"""The page in a real browser: what it shows, that it lives, that a peer's text stays text, that a keyboard suffices."""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Final
from urllib.parse import urlsplit

import pytest

from otel_smtp.smtp.states import ConnState
from otel_smtp.status.siblings import Siblings
from otel_smtp.telemetry.shapes import EncodedSpan
from tests.support import axe
from tests.support.busy_gateway import HOSTILE, QUEUE_TOKEN, BusyGateway, busy_gateway
from tests.support.chromium import PROGRAM, Page, chromium
from tests.support.ports import unclaimed_port
from tests.support.spans import Identity, Kind, Span, Value, encoded, mail_trace

FILES: Final = {
    each.name: each.read_text() for each in (resources.files("otel_smtp.status") / "page").iterdir() if each.is_file()
}
TRACE: Final = "c0ffee0000000000000000000000beef"
ALL_SHOWN: Final = "document.querySelectorAll('#connections tbody tr').length === 3"

in_a_browser = pytest.mark.skipif(
    PROGRAM is None and not os.environ.get("CI"), reason="chromium is not installed (Debian package chromium)"
)


@asynccontextmanager
async def shown(fragment: str = "", **how: bool) -> AsyncIterator[tuple[BusyGateway, Page]]:
    assert PROGRAM is not None, "CI installs Chromium"
    async with busy_gateway() as (gateway, url), chromium() as page:
        await page.open(url + fragment, **how)
        await page.until(ALL_SHOWN)
        yield gateway, page
        assert list(page.problems) == []


def test_no_script_makes_markup_out_of_text() -> None:
    for name, text in FILES.items():
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert way not in text, f"{way} in {name}"


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline() -> None:
    for name, text in FILES.items():
        for url in re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"(?m)//\s.*$", "", text)):
            assert url == "http://www.w3.org/2000/svg", f"{url} in {name}"
    markup = FILES["index.html"]
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\bsrc=)", markup)


@in_a_browser
async def test_it_shows_connections_traces_upstreams_and_queue() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        assert await page.evaluate("document.getElementById('readiness').textContent") == "Ready"
        rows = await page.evaluate(
            "[...document.querySelectorAll('#connections tbody tr')].map((row) => row.cells[1].textContent)"
        )
        assert rows == ["Data", "Idle", "Active"]
        verdicts = await page.evaluate(
            "[...document.querySelectorAll('#trace-list .verdict')].map((each) => each.dataset.severity)"
        )
        assert verdicts[0] == "refused", "the newest first"
        assert set(verdicts) == {"failed", "refused", "ok"}
        breakers = await page.evaluate("[...document.querySelectorAll('.breaker')].map((each) => each.dataset.breaker)")
        assert breakers == ["closed", "open"]


@pytest.mark.long
@in_a_browser
async def test_it_follows_the_gateway_without_a_reload() -> None:
    async with shown() as (gateway, page):
        await page.evaluate("window.stayed = true")
        gateway.machines[1].enter(ConnState.ACTIVE)
        await page.until(
            "document.querySelector('#connections tbody tr:nth-child(2)').cells[1].textContent === 'Active'"
        )
        for span in mail_trace(0xFEED, domain="fresh.example", start_ns=time.time_ns()):
            gateway.traces.add([span])
        await page.until("document.getElementById('trace-list').textContent.includes('fresh.example')")
        gateway.not_ready = "draining"
        await page.until("document.getElementById('readiness').textContent === 'Not ready: mail: draining'")
        assert await page.evaluate("window.stayed") is True


@pytest.mark.long
@in_a_browser
async def test_a_bounce_and_what_an_operator_did_are_no_attempts_at_the_mail() -> None:
    connection, transaction, attempt = (one.to_records()[0] for one in reversed(mail_trace(0xB0B, outcome="queued")))

    def below(span_id: int, name: str, **attributes: Value) -> EncodedSpan:
        of_span = {f"smtp.{key.replace('__', '.')}": value for key, value in attributes.items()}
        identity, parent, start_ns = Identity(0xB0B, span_id), transaction.context, attempt.start_ns + span_id
        return encoded(Span(name, Kind.CLIENT, identity, parent, start_ns, attempt.end_ns, of_span, [], [], False))

    async with shown() as (gateway, page):
        for span in (
            encoded(attempt),
            encoded(transaction),
            encoded(connection),
            below(11, "smtp.delivery", message__kind="delay_warning", upstream__name="provider", outcome="relayed"),
            below(12, "smtp.spool", message__kind="mail", spool__action="given_up", spool__operator="olga"),
            below(13, "smtp.delivery", message__kind="bounce", upstream__name="provider", outcome="relayed"),
        ):
            gateway.traces.add([span])
        await page.evaluate(f"void (location.hash = 'trace={0xB0B:032x}')")
        await page.until("document.querySelectorAll('button.label').length === 6")
        rows = await page.evaluate("[...document.querySelectorAll('button.label')].map((each) => each.textContent)")
        assert rows[2:] == ["delivery provider", "delay warning provider", "queue given up", "bounce provider"]
        notes = await page.evaluate("[...document.querySelectorAll('.bar-time')].map((each) => each.textContent)")
        assert notes[4].endswith("by olga")


@in_a_browser
async def test_what_a_peer_wrote_stays_text() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        for place in ("#connections", "#trace-list", "#queue"):
            text = await page.evaluate(f"document.querySelector({json.dumps(place)}).textContent")
            assert HOSTILE[:40] in text, place
        # A trace whose attributes hold the same text.
        await page.evaluate(
            "[...document.querySelectorAll('.trace-item')].find((each) => each.title.includes('<img')).click()"
        )
        await page.until("document.querySelectorAll('.mark').length === 8")
        await page.evaluate("[...document.querySelectorAll('button.label')].at(1).click()")
        assert HOSTILE in await page.evaluate("document.querySelector('.details').textContent")
        assert await page.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert await page.evaluate("document.title") == "gw.example.com – otel-smtp"


@pytest.mark.long
@in_a_browser
async def test_a_mark_tells_its_event_when_hovered_and_stays_told_when_clicked() -> None:
    async with shown(f"#trace={TRACE}") as (_, page):
        await page.until("document.querySelectorAll('.mark').length === 25")
        # The page may still be laid out when the mouse comes; then it comes again.
        async with asyncio.timeout(20):
            while await page.evaluate("document.getElementById('tip').hidden"):
                await page.hover("footer")
                await page.hover(".mark[data-state=Auth]")
        tip = await page.evaluate("document.getElementById('tip').innerText")
        assert "Auth" in tip
        assert "SCRAM-SHA-256" in tip
        assert await page.evaluate("document.querySelector('.events tr.lit').textContent.includes('Auth')")
        await page.click(".mark[data-state=Auth]")
        await page.hover("footer")
        assert await page.evaluate("document.getElementById('tip').hidden") is True
        details = await page.evaluate("document.querySelector('.details').textContent")
        assert "smtp.auth.mechanism" in details
        assert await page.evaluate("document.querySelector('.mark[aria-pressed=true]').dataset.state") == "Auth"


@in_a_browser
async def test_marks_stand_where_their_time_is() -> None:
    async with shown(f"#trace={TRACE}") as (_, page):
        await page.until("document.querySelectorAll('.axis span').length > 0")
        # Asked in one go, since the page may be laid out again between two questions.
        lefts, width = await page.evaluate(
            "[[...document.querySelectorAll('.axis-row + .row .mark')].map((mark) => parseFloat(mark.style.left)),"
            " document.querySelector('.axis').clientWidth]"
        )
        assert lefts == pytest.approx([number * 7 / 86 * width for number in range(13)], abs=0.5)
        await page.evaluate("[...document.querySelectorAll('button.label')].at(-1).click()")
        await page.click(".details h4 .link")
        shown_marks = await page.evaluate(
            "[...document.querySelectorAll('.mark')].filter((mark) => !mark.hidden).length"
        )
        assert 11 <= shown_marks < 25, "zoomed to the delivery"
        await page.click(".axis-row .link")
        assert await page.evaluate("[...document.querySelectorAll('.mark')].every((mark) => !mark.hidden)")


@in_a_browser
async def test_a_trace_on_its_way_is_not_asked_for_again() -> None:
    """The list comes while it is fetched, and says how many spans it has; a second drawing would undo a selection."""
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        await page.evaluate(
            """void (() => {
                const there = window.fetch;
                window.lists = window.traces = 0;
                const held = new Promise((release) => { window.release = release; });
                window.fetch = async (url, ...rest) => {
                    if (url.startsWith("/api/traces/")) { window.traces += 1; await held; return there(url, ...rest); }
                    const answer = await there(url, ...rest);
                    return { ok: answer.ok, json: async () => {
                        const found = await answer.json();
                        setTimeout(() => { window.lists += 1; }); // once the page has looked at it
                        return found;
                    } };
                };
            })()"""
        )
        await page.evaluate(f"void (location.hash = '#trace={TRACE}')")
        await page.until("window.traces === 1")
        await page.evaluate("void document.getElementById('search').requestSubmit()")
        await page.until("window.lists >= 1")
        await page.evaluate("void window.release()")
        await page.until("document.querySelectorAll('.mark').length === 25")
        assert await page.evaluate("window.traces") == 1


@in_a_browser
async def test_the_keyboard_reaches_every_event() -> None:
    async with shown(f"#trace={TRACE}") as (_, page):
        await page.until("document.querySelectorAll('.mark').length === 25")
        tabbable = await page.evaluate(
            "[...document.querySelectorAll('.mark')].filter((mark) => mark.tabIndex === 0).length"
        )
        assert tabbable == 1, "a waterfall is one stop, its marks are reached by arrows"
        await page.evaluate("document.querySelector('.mark').focus()")
        names = [await page.evaluate("document.activeElement.ariaLabel")]
        for _ in range(24):
            await page.press("ArrowRight")
            names.append(await page.evaluate("document.activeElement.ariaLabel"))
        assert len(set(names)) == 25
        assert names[0] == "New at 0 µs"
        assert names[6] == "Error at 35.0 ms: RCPT · 550 · No such user here · address"
        await page.press("ArrowLeft", times=18)
        await page.press("Enter")
        assert "550" in await page.evaluate("document.querySelector('.details').textContent")


@pytest.mark.long
@in_a_browser
async def test_search_and_errors_by_keyboard() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        await page.press("/")
        assert await page.evaluate("document.activeElement.id") == "query"
        await page.type("451 deferred")
        await page.until("document.querySelectorAll('#trace-list li').length === 4")
        assert await page.evaluate("document.getElementById('traces-count').textContent") == "4 failed"
        await page.press("Escape")
        assert await page.evaluate("document.activeElement.id") == "", "Esc leaves the field"
        await page.press("j")
        await page.press("j")
        await page.press("k")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.mark').length > 0")
        first = await page.evaluate("document.querySelector('#trace-list li').dataset.key")
        assert await page.evaluate("location.hash") == f"#q=451+deferred&trace={first}", "can be sent to a colleague"
        await page.press("j")
        await page.until(f"!location.hash.includes('{first}') && location.hash.includes('trace=')")
        await page.press("Escape")
        await page.until("document.querySelectorAll('.mark').length === 0")
        assert await page.evaluate("location.hash") == "#q=451+deferred"
        await page.evaluate("history.back()")
        await page.until("document.querySelectorAll('.mark').length > 0")


@in_a_browser
async def test_errors_are_marked_and_can_be_had_alone() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        await page.click("input[name=only][value=errors] + span")
        await page.until("document.querySelectorAll('#trace-list li').length === 9")
        assert await page.evaluate("location.hash") == "#only=errors"
        marks = await page.evaluate(
            "[...document.querySelectorAll('.trace-item')].map((each) => each.dataset.severity)"
        )
        assert set(marks) == {"failed", "refused"}
        words = await page.evaluate("document.querySelector('.trace-item .words').textContent")
        assert words == "550 No such user here", "who refused is quoted in the list"


@pytest.mark.long
@in_a_browser
async def test_a_mail_that_its_client_gave_up_has_no_mark_of_one_that_went_well() -> None:
    async with shown() as (gateway, page):
        for span in mail_trace(0xFEED, outcome="aborted", domain="fresh.example", start_ns=time.time_ns()):
            gateway.traces.add([span])
        await page.until("document.getElementById('trace-list').textContent.includes('fresh.example')")
        colors = await page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.verdict')].map((each) => "
            "[each.dataset.severity, getComputedStyle(each, '::before').color]))"
        )
        assert colors["aborted"] == colors["refused"] != colors["ok"]


@in_a_browser
async def test_the_mark_beside_many_outcomes_is_round() -> None:
    """A connection with several mails has several outcomes, which need several lines."""
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        mark = "getComputedStyle(document.querySelector('.verdict'), '::before')"
        width, height = await page.evaluate(
            "document.querySelector('.verdict').textContent = 'refused, queued, partly relayed, relayed, aborted', "
            f"[{mark}.width, {mark}.height]"
        )
        assert width == height


@pytest.mark.long
@in_a_browser
async def test_back_closes_what_was_opened() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        await page.click("#trace-list li:nth-child(1) button")
        await page.until("document.querySelector('.trace-head h3')")
        first = await page.evaluate("location.hash")
        await page.click("#trace-list li:nth-child(2) button")
        await page.until(f"location.hash !== {json.dumps(first)} && document.querySelector('.trace-head h3')")
        await page.evaluate("history.back()")
        await page.until(f"'#trace=' + document.querySelector('.trace-head h3')?.textContent === {json.dumps(first)}")
        await page.evaluate("history.back()")
        await page.until("document.getElementById('trace').textContent.startsWith('Choose a trace')")
        await page.evaluate("history.forward()")
        await page.until(f"'#trace=' + document.querySelector('.trace-head h3')?.textContent === {json.dumps(first)}")


@in_a_browser
async def test_what_was_said_stands_beside_each_refused_event() -> None:
    async with shown(f"#trace={TRACE}") as (_, page):
        await page.until("document.querySelectorAll('.mark').length === 25")
        rows = await page.evaluate(
            "[...document.querySelectorAll('.events tr[data-error]')].map((row) => row.lastChild.textContent)"
        )
        assert "RCPT · 550 · No such user here · address" in rows
        assert "example.org · refused · 550 · No such user here · provider" in rows


@in_a_browser
async def test_the_keys_are_told() -> None:
    async with shown() as (_, page):
        await page.press("?")
        assert await page.evaluate("document.getElementById('keys').open")
        await page.press("j")
        assert await page.evaluate("document.getElementById('keys').open"), "keys are the dialog's while it is open"
        await page.press("Escape")
        assert not await page.evaluate("document.getElementById('keys').open")
        await page.click("#show-keys")
        await page.click("#keys .shut")
        assert not await page.evaluate("document.getElementById('keys').open")
        legend = await page.evaluate("[...document.querySelectorAll('#legend li')].map((each) => each.textContent)")
        assert legend == [
            "N New", "T StartTLS", "A Active", "U Auth", "D Data", "I Idle", "R Reset", "E Error", "C Closed",
        ]  # fmt: skip


@pytest.mark.long
@in_a_browser
async def test_a_long_list_has_pages() -> None:
    async with shown() as (gateway, page):
        day_ns = 86_400_000_000_000
        for number in range(1, 231):
            for span in mail_trace(0xA0000 + number, start_ns=time.time_ns() - 400 * day_ns + number * 1_000_000_000):
                gateway.traces.add([span])
        await page.until("document.getElementById('trace-place').textContent === '1–100 of 255'")
        await page.click("#older")
        await page.until("document.getElementById('trace-place').textContent === '101–200 of 255'")
        assert re.search(r"20\d\d", await page.evaluate("document.querySelector('.trace-item').textContent")), "a date"
        await page.click("#older")
        await page.until("document.querySelectorAll('#trace-list li').length === 55")
        assert await page.evaluate("document.getElementById('older').disabled")
        for span in mail_trace(0xFEED, domain="fresh.example", start_ns=time.time_ns()):
            gateway.traces.add([span])
        await page.click("#newer")
        await page.until("document.getElementById('trace-place').textContent === '101–200 of 255'")
        await page.click("#newer")
        await page.until("document.getElementById('trace-place').textContent === '1–100 of 256'")


@pytest.mark.long
@in_a_browser
async def test_on_a_telephone_a_trace_lies_over_the_list() -> None:
    async with shown() as (_, page):
        await page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        await page.click("#trace-list li:nth-child(1) button")
        await page.until("document.querySelector('.trace-head h3') === document.activeElement")
        box = "document.getElementById('trace').getBoundingClientRect()"
        assert await page.evaluate(f"[{box}.left, {box}.top, {box}.width, {box}.height]") == [0, 0, 390, 844]
        assert await page.evaluate("document.elementFromPoint(195, 400).closest('#trace') !== null")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        events = "document.querySelector('.trace .events')"
        assert await page.evaluate(f"{events}.scrollHeight <= {events}.clientHeight"), (
            "the trace scrolls, not its parts"
        )
        controls = "[...document.querySelectorAll('a, button, input')]"
        reachable = await page.evaluate(f"{controls}.filter((each) => !each.closest('[inert], dialog, #trace')).length")
        assert reachable == 0, "nothing below it can be reached by the keyboard"
        await page.click(".trace .shut")
        await page.until("document.querySelectorAll('.mark').length === 0")
        assert await page.evaluate("document.activeElement.className") == "trace-item"
        assert not await page.evaluate("document.querySelector('[inert]') !== null")


@in_a_browser
async def test_a_trace_leads_to_the_backend_and_out_of_the_queue() -> None:
    async with shown() as (_, page):
        await page.until("document.querySelector('#queue-messages button')")
        await page.click("#queue-messages button")
        await page.until("document.querySelector('.trace-head h3')")
        assert await page.evaluate("document.querySelector('.trace-head h3').textContent") == TRACE
        links = await page.evaluate("[...document.querySelectorAll('.trace-head a')].map((link) => link.href)")
        assert links[0] == f"http://127.0.0.1:16686/trace/{TRACE}"
        assert links[1].endswith(f"/api/traces/{TRACE}")


@pytest.mark.long
@in_a_browser
async def test_every_control_has_a_name_and_no_page_scrolls_sideways() -> None:
    async with shown(f"#trace={TRACE}") as (_, page):
        await page.until("document.querySelectorAll('.mark').length === 25")
        nameless = await page.evaluate(
            """[...document.querySelectorAll('button, input, a, [role=img], [role=group], table th')]
            .filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length
                || each.getAttribute('aria-labelledby'))).map((each) => each.outerHTML)"""
        )
        assert nameless == []
        for width in (1400, 900, 420):
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            assert await page.evaluate("document.documentElement.scrollWidth") <= width


_CONTRAST: Final = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgb = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const light = (color) => color.slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = (element) => { for (let at = element; at; at = at.parentElement) {
        const color = rgb(getComputedStyle(at).backgroundColor); if (color[3] === 255) return color; } };
    const poor = [];
    for (const element of document.querySelectorAll("body *")) {
        const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!isText || !element.checkVisibility() || element.closest(".skip, .unseen, noscript")) continue;
        const style = getComputedStyle(element);
        if (parseFloat(style.fontSize) === 0) continue;
        const [a, b] = [light(rgb(style.color)), light(ground(element))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) poor.push(`${element.className} ${element.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
    }
    return poor;
})()"""


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
async def test_all_text_stands_out_from_its_ground(dark: bool) -> None:
    """WCAG 2.2 1.4.3: 4.5 to 1, in the light and in the dark."""
    async with shown(f"#trace={TRACE}", dark=dark) as (_, page):
        await page.until("document.querySelectorAll('.mark').length === 25")
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        assert await page.evaluate(_CONTRAST) == []


ACTIONS: Final = "[...document.querySelectorAll('#queue-messages tr:nth-child(1) .actions button')]"


@pytest.mark.long
@in_a_browser
async def test_an_operator_with_the_token_acts_on_the_queue() -> None:
    async with shown() as (gateway, page):
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        assert await page.evaluate("document.querySelector('.actions')") is None
        for token in ("not-this-one-surely", QUEUE_TOKEN):
            await page.click("#unlock")
            await page.type(token)
            await page.press("Enter")
            await page.until(f"{ACTIONS}.length === 3")
            assert await page.evaluate(f"{ACTIONS}.map((each) => each.textContent)") == ["Retry", "Hold", "Give up"]
            await page.evaluate(f"{ACTIONS}[1].click()")
            if token != QUEUE_TOKEN:
                await page.until("document.getElementById('queue-told').textContent === 'Not done: the token is wrong'")
                await page.until(f"{ACTIONS}.length === 0")
                assert gateway.done == []
                page.problems.clear()  # the browser logs the 403
        await page.until("document.getElementById('queue-told').textContent === '01J9ZQ4T3M is held'")
        await page.until(f"{ACTIONS}[1]?.textContent === 'Release'")
        await page.evaluate(f"{ACTIONS}[2].click()")
        await page.press("Enter")  # Keep it
        assert gateway.done == [("hold", ["01J9ZQ4T3M"])]
        await page.evaluate(f"{ACTIONS}[2].click()")
        assert await axe.findings(page) == []
        await page.click("#give-up button[value=expire]")
        await page.until("document.getElementById('queue-told').textContent === '01J9ZQ4T3M is given up'")
        assert gateway.done[1:] == [("expire", ["01J9ZQ4T3M"])]
        await page.click("#unlock")
        await page.until(f"{ACTIONS}.length === 0")


@pytest.mark.long
@in_a_browser
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("has_trace", [False, True])
async def test_axe_finds_nothing(width: int, has_trace: bool) -> None:
    async with shown() as (_, page):
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        await page.until("document.querySelectorAll('#trace-list li').length === 25")
        if has_trace:
            await page.evaluate("document.querySelector('.trace-item').click()")
            await page.until("document.querySelectorAll('.mark').length === 25")
        assert await axe.findings(page) == []
        if not has_trace:
            await page.evaluate("document.getElementById('show-keys').click()")
            assert await axe.findings(page) == []


@pytest.mark.long
@in_a_browser
@pytest.mark.parametrize("width", [1400, 390])
async def test_the_gateways_of_a_shared_queue_are_shown(width: int) -> None:
    async with shown() as (gateway, page):
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 2")
        assert await page.evaluate("document.getElementById('sharing').hidden")
        assert await page.evaluate("document.querySelector('#queue-messages tbody tr').cells.length") == 7
        gateway.is_shared = True
        await page.until("document.querySelectorAll('#queue-messages tbody tr').length === 3")
        rows = "[...document.querySelectorAll('#queue-messages tbody tr')].map((row) => row.cells[3].textContent)"
        assert await page.evaluate(rows) == ["–", "–", "gw-1 for 1.4 s"]
        beats = "[...document.querySelectorAll('#gateways .beat')].map((each) => each.textContent)"
        assert await page.evaluate(beats) == [
            "lives, lease for 8.1 s", "lives, lease for 9.6 s", "silent, its lease ended 1.3 s ago",
        ]  # fmt: skip
        assert await page.evaluate("document.querySelector('#gateways .tag').previousSibling.textContent") == "gw-0"
        assert "null" not in await page.evaluate("document.getElementById('gateways').textContent")
        gone = "[...document.querySelectorAll('#departures li')].map((each) => each.textContent)"
        assert await page.evaluate(gone) == [
            "gw-2 was silent for 10 s: gw-0 took over, and 3 deliveries go on, 41 s ago", f"{HOSTILE} left, 11 min ago",
        ]  # fmt: skip
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert await page.evaluate(_CONTRAST) == []
        assert await axe.findings(page) == []
        gateway.is_shared = False
        await page.until("document.getElementById('sharing').hidden")


@pytest.mark.long
@in_a_browser
async def test_a_lost_gateway_is_told_and_a_trace_that_left_memory_too() -> None:
    async with busy_gateway() as (_, url), chromium() as page:
        await page.open(f"{url}#trace=abcdef")
        await page.until("document.getElementById('trace').textContent.includes('has left')")
        page.problems.clear()  # the browser logs the 404
        leaving = url
    assert leaving
    async with chromium() as page:
        async with busy_gateway() as (_, url):
            await page.open(url)
            await page.until(ALL_SHOWN)
        await page.until("document.getElementById('readiness').dataset.state === 'lost'")


@pytest.mark.long
@in_a_browser
async def test_rows_of_several_processes_name_theirs_and_the_head_who_is_silent() -> None:
    token = "5e" * 32
    async with busy_gateway(token=token) as (other, address), chromium() as page:
        port = urlsplit(address).port
        assert port is not None
        async with busy_gateway(siblings=Siblings(0, {1: port, 2: unclaimed_port()}, token)) as (_, url):
            await page.open(url)
            await page.until("document.querySelectorAll('#connections tbody tr').length === 6")
            rows = "document.querySelector('#connections tbody').textContent"
            await page.until(f"{rows}.includes('local · process 0') && {rows}.includes('local · process 1')")
            head = "document.getElementById('readiness').textContent"
            await page.until(f"{head}.includes('Ready; nothing is known of process 2')")
            other.not_ready = "no upstream"
            await page.until(f"{head}.includes('mail (process 1): no upstream; nothing is known of process 2')")
            assert await page.evaluate("document.querySelectorAll('#connections tbody tr').length") == 6
            assert list(page.problems) == []
