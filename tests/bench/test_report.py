"""What is made of the figures: goals, the one sentence, table and JSON."""

from dataclasses import replace

import pytest

from tests.bench import report
from tests.bench.figures import Results, rate
from tests.bench.goals import DURABLE, HALF, HEADLINE, LARGE, MANY, TRACED, goals, outrun
from tests.bench.made import GO, GOOD, results, run
from tests.bench.targets import gateway, peers

SENTENCE = "A fully traced gateway in Python that outruns the untraced relays in Go, C and JavaScript."


def missed(found: Results) -> list[str]:
    return [goal.what for goal in goals(found) if goal.is_met is not True]


def test_goals_that_are_met() -> None:
    assert missed(results()) == []


def test_goals_that_were_not_measured_are_neither_met_nor_missed() -> None:
    assert {goal.is_met for goal in goals(Results())} == {None}


@pytest.mark.parametrize(
    ("relay", "figures", "expected"),
    [
        (peers.AIOSMTPD.name, (350, 2_000), ["CPU per mail, traced : aiosmtpd + aiosmtplib"]),
        (peers.AIOSMTPD.name, (480, 2_500), ["mails/s, traced : aiosmtpd + aiosmtplib"]),
        (peers.NODEMAILER.name, (159, 4_200), ["CPU per mail, traced : nodemailer"]),
        (peers.POSTFIX_PROXY.name, (240, 6_200), ["mails/s, traced : Postfix smtpd_proxy_filter"]),
        (GO, (136, 5_900), [f"CPU per mail, traced : {GO}"]),
        (peers.NULL.name, (31, 20_000), ["CPU per mail, traced : null relay, nothing parsed"]),
        (gateway.SAMPLED.name, (76, 11_600), ["mails/s, sampled to nothing : tracing off"]),
        (gateway.OFF.name, (69, 12_000), ["CPU per mail, traced only : tracing off", "CPU per mail that tracing adds"]),
    ],
)
def test_a_goal_is_missed_by_its_own_figure(relay: str, figures: tuple[float, float], expected: list[str]) -> None:
    assert missed(results({relay: figures})) == expected


def test_the_goals_beside_the_headline() -> None:
    found = results()
    found.load(HALF).relays[TRACED] = [run(96, 9_900, p99_ms=2.6)] * 5
    found.load(LARGE).relays[TRACED] = [run(18_000, 60)] * 5
    found.load(MANY).relays[gateway.TWO.name] = [run(105, 19_000)] * 5
    shared = gateway.QUEUE_POSTGRESQL.name
    found.load(DURABLE[1]).relays[shared] = [run(540, 1_900, beside_cpu_us=360)] * 5
    found.idle_octets.clear()
    assert found.long_run is not None
    found.long_run.samples[-2:] = [replace(found.long_run.samples[0], p99_ms=2.3, resident_octets=70_000_000)] * 2
    assert missed(found) == [
        "p99 at half of its own highest rate, traced : tracing off",
        "CPU per mail of 5 MiB, traced : Postfix smtpd_proxy_filter",
        "idle connection, traced",
        "durable mails/s, 50 sessions, traced, in PostgreSQL : gateway-queue, traced",
        "CPU per durable mail with the database's, 50 sessions, in PostgreSQL : gateway-queue, traced",
        "CPU per durable mail of the gateway alone, 50 sessions, in PostgreSQL : gateway-queue, traced",
        "CPU per mail, 2 workers : 1 (the load has no cores of its own here)",
        "long run, p99: last quarter : first quarter",
        "long run, resident memory: last quarter : first quarter",
    ]
    found.spread = True  # then mails per second decide
    assert not any("2 workers" in what for what in missed(found))


def test_ratios_are_taken_within_a_round() -> None:
    found = results(rounds=2)
    found.load(HEADLINE).relays = {"a": [run(1, 10), run(1, 100)], "b": [run(1, 5), run(1, 50), run(1, 1)]}
    ratio = found.ratio(HEADLINE, "a", "b", rate)
    assert ratio is not None
    assert ratio.rounds == (2, 2)


@pytest.mark.parametrize(
    ("name", "figures", "sentence"),
    [
        (GO, (180, 5_900), SENTENCE),
        # A gateway of ours, and a relay that traces, are no competitors.
        (gateway.OFF.name, (75, 12_000), SENTENCE),
        (peers.AIOSMTPD_TRACED.name, (700, 99_000), SENTENCE),
        (
            peers.NODEMAILER.name,
            (220, 9_901),
            "Fully traced, it relays more mails per second than the untraced relays in Go, Python and C, "
            "but not more than those in JavaScript.",
        ),
    ],
)
def test_the_sentence_is_said_where_it_is_true(name: str, figures: tuple[float, float], sentence: str) -> None:
    found = results({name: figures})
    assert report.headline(found) == sentence
    assert sentence in report.readme(found)


def test_the_sentence_is_not_said_of_what_was_not_measured() -> None:
    found = results()
    del found.load(HEADLINE).relays[GO]
    assert outrun(found) == {"Python": True, "JavaScript": True, "C": True}
    assert report.headline(found) == (
        "Fully traced, it relays more mails per second than the untraced relays in Python, JavaScript and C "
        "(no relay in Go was measured to the end)."
    )
    failed = results()
    failed.load(HEADLINE).relays[GO].pop()
    assert report.headline(failed) == report.headline(found)
    slow = results({name: (1, 99_000) for name in GOOD if name != TRACED})
    assert report.headline(slow) == ""


def test_the_sentence_agrees_with_the_chart_and_with_the_ratios() -> None:
    found = results()
    for name, rates in [(TRACED, (10, 9, 5, 4, 3)), (peers.NODEMAILER.name, (9, 8, 6, 6, 2))]:
        runs = found.runs(HEADLINE, name)
        runs[:] = [replace(one, rate=per_second) for one, per_second in zip(runs, rates, strict=True)]
    ratio = found.ratio(HEADLINE, TRACED, peers.NODEMAILER.name, rate)
    assert ratio is not None
    assert ratio.median > 1  # but the medians of the rates, 5 and 6, say the contrary
    assert outrun(found)["JavaScript"] is False


def test_what_is_not_for_publication_is_not_in_the_readme() -> None:
    assert report.reservations(results()) == []
    assert report.readme(results()) != ""
    few = results(rounds=4)
    busy = results()
    busy.load_average["headline"] = (0.6, 2.0)
    for found, why in [(few, "4 rounds"), (busy, "busy")]:
        assert why in " ".join(report.reservations(found))
        assert "Not for publication" in report.as_markdown(found, [])
        assert report.readme(found) == ""


def test_a_report_can_be_made_again_from_its_json() -> None:
    found = results()
    found.load(HEADLINE).failed["Haraka smtp_forward"] = "round 2 of 5: it ended under load"
    found.skipped["Haraka smtp_forward, round 2 of 5"] = "it ended under load"
    again = report.decode(report.encode(found))
    assert again == found
    assert report.as_markdown(again, ["a.svg"]) == report.as_markdown(found, ["a.svg"])
    assert "| Haraka smtp_forward: **failed**: round 2 of 5: it ended under load |" in report.as_markdown(again, [])
