"""Spans of one connection come together, whatever order and trace they stand in."""

from otel_smtp.commands.terminal.spans import Stories
from tests.commands.terminal.traces import Span, at, refused_mail, two_mails_with_failover


def span(name: str, span_id: int, parent_id: int = 0, links_to: int | None = None) -> Span:
    return Span(name, span_id, parent_id, at(0), at(1), links_to=links_to)


def names(story: object) -> list[tuple[str, int]]:
    assert isinstance(story, list)
    return sorted((one.name, one.context.span_id) for one in story)


def test_spans_are_collected_when_their_connection_has_ended() -> None:
    stories = Stories()
    *before, last = refused_mail()
    assert [stories.take(one) for one in before] == [None, None]
    story = stories.take(last)
    assert story is not None
    assert story[0].name == "smtp.connection"
    assert names(story) == [("smtp.connection", 1), ("smtp.delivery", 3), ("smtp.transaction", 2)]
    assert len(stories) == 0


def test_connections_that_overlap_are_kept_apart() -> None:
    stories = Stories()
    for one in [*two_mails_with_failover()[:-1], span("smtp.transaction", 21, 20), span("smtp.delivery", 22, 21)]:
        assert stories.take(one) is None
    assert names(stories.take(span("smtp.connection", 20))) == [
        ("smtp.connection", 20),
        ("smtp.delivery", 22),
        ("smtp.transaction", 21),
    ]
    assert len(stories.take(two_mails_with_failover()[-1]) or []) == 6
    assert len(stories) == 0


def test_a_transaction_in_the_applications_trace_is_found_by_its_link() -> None:
    stories = Stories()
    stories.take(span("smtp.delivery", 3, 2))
    stories.take(span("smtp.transaction", 2, 99, links_to=1))  # 99 is the application's
    assert len(stories.take(span("smtp.connection", 1)) or []) == 3
    assert len(stories) == 0


def test_a_connection_of_the_same_application_does_not_take_anothers_transaction() -> None:
    stories = Stories()
    stories.take(span("smtp.transaction", 2, 99, links_to=1))
    stories.take(span("smtp.transaction", 12, 99, links_to=11))
    assert names(stories.take(span("smtp.connection", 11)))[1] == ("smtp.transaction", 12)
    assert names(stories.take(span("smtp.connection", 1)))[1] == ("smtp.transaction", 2)


def test_spans_without_a_connection_are_dropped_in_time() -> None:
    stories = Stories(most_waiting=3)
    for number in range(100, 110):
        stories.take(span("smtp.delivery", number, 50))
    assert len(stories) == 3
    assert [span_id for _, span_id in names(stories.take(span("smtp.connection", 50)))[1:]] == [107, 108, 109]
    assert len(stories) == 0


def test_the_next_segment_of_a_connection_is_a_story_of_its_own() -> None:
    stories = Stories()
    assert len(stories.take(span("smtp.connection", 1)) or []) == 1
    assert len(stories.take(span("smtp.connection", 2, links_to=1)) or []) == 1
    assert len(stories) == 0
