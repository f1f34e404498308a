"""The ledger: everything that others can make grow, each with its bound.

A row names the setting or constant that is its bound. `tests/test_bounds.py` reads each of them, and checks that the
row's test exists; deploy/reference has the table with the values. Everything that a client, an upstream, a collector, a
reader of the status port or a neighbour can make grow has its row here.
"""

from enum import StrEnum
from typing import Final, NamedTuple


class Whose(StrEnum):
    """Who makes it grow."""

    CLIENT = "a client"
    UPSTREAM = "an upstream"
    COLLECTOR = "a collector"
    RECEIVER = "a receiver of outcomes"
    READER = "a reader of the status port"
    LOG_READER = "a reader of the log"
    NEIGHBOUR = "a neighbour on this machine"


class Bound(NamedTuple):
    """A row.

    Attributes:
        whose: see `Whose`.
        what: grows.
        by: the bounding settings, by path; or constants, by module and name.
        beyond: what happens then.
        test: the test that shows it, by file and name.
    """

    whose: Whose
    what: str
    by: tuple[str, ...]
    beyond: str
    test: str


_LIMITS: Final = "tests/test_limits.py::test_a_bound_holds"
_DRIVEN: Final = "tests/end_to_end/test_bounds.py::"
_CLIENT, _UPSTREAM, _COLLECTOR, _RECEIVER, _READER, _LOG_READER, _NEIGHBOUR = Whose

LEDGER: Final = (
    # Connections and time
    Bound(
        _CLIENT,
        "connections",
        ("limits.connections",),
        "the one least missed gives way to a client that has fewer, else 421",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(_CLIENT, "connections of one address", ("limits.connections_per_client",), "421, and closed", _LIMITS),
    Bound(_CLIENT, "time between commands", ("timeouts.command", "timeouts.command_under_stress"), "421", _LIMITS),
    Bound(
        _CLIENT,
        "time for content, by DATA or in chunks",
        ("timeouts.data", "limits.octets_per_second"),
        "421",
        "tests/server/test_session.py::test_content_in_chunks_has_its_time_as_a_whole",
    ),
    Bound(_CLIENT, "time of a connection", ("timeouts.session",), "421", _LIMITS),
    Bound(_CLIENT, "time of a TLS handshake", ("timeouts.tls_handshake",), "closed", _LIMITS),
    Bound(
        _CLIENT,
        "seconds for a PROXY header",
        ("otel_smtp.server.admission.PROXY_HEADER_SECONDS",),
        "554",
        "tests/server/test_session.py::test_a_proxy_header_that_does_not_end_is_waited_for_five_seconds",
    ),
    Bound(
        _CLIENT,
        "seconds in which it reads no reply",
        ("otel_smtp.server.conversation.UNREAD_REPLIES_SECONDS",),
        "closed",
        "tests/server/test_session.py::test_a_client_that_never_reads_its_replies_is_cut_off",
    ),
    # What one connection holds and does
    Bound(
        _CLIENT,
        "octets that are not read yet, or replies that it does not read, each",
        ("otel_smtp.net.stream.HIGH_WATER_OCTETS",),
        "its input stays with the kernel",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _CLIENT,
        "commands in one turn of the event loop, of all connections that pipeline beyond it",
        ("otel_smtp.smtp.policy.ServerPolicy.commands_per_turn",),
        "they wait for a later turn",
        "tests/server/test_session.py::test_all_that_pipeline_share_one_turn",
    ),
    Bound(
        _CLIENT, "commands refused for its own fault", ("limits.errors",), "421", f"{_DRIVEN}test_far_beyond_a_bound"
    ),
    Bound(
        _CLIENT,
        "other refused commands, between two messages that are accepted",
        ("limits.refusals", "limits.recipients"),
        "421 beyond the sum",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _CLIENT,
        "commands, and empty chunks, that move no mail",
        ("limits.junk_commands",),
        "421",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _CLIENT,
        "octets of a line",
        ("limits.command_line", "limits.auth_line"),
        "500; read off within a bound, then 421",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(_CLIENT, "messages on a connection", ("limits.messages_per_connection",), "421", _LIMITS),
    Bound(_CLIENT, "failed logins on a connection", ("limits.auth_failures",), "421", _LIMITS),
    Bound(
        _CLIENT,
        "failed logins of an address in a minute",
        ("limits.auth_failures_per_minute",),
        "421 at connect; on loopback, where one address is many clients, its owner has five judged in a second",
        _LIMITS,
    ),
    Bound(
        _CLIENT,
        "seconds between two logins of an owner, or address, that has failed so often",
        ("otel_smtp.server.guesses.GUESS_SECONDS",),
        "they wait, right or wrong, and hold no place meanwhile",
        "tests/server/test_session.py::test_guesses_beyond_the_limit_wait_for_their_turn_right_or_wrong",
    ),
    Bound(
        _CLIENT,
        "of its logins that wait",
        ("otel_smtp.server.guesses.MOST_WAITING",),
        "421, the name that has failed most first",
        "tests/server/test_guesses.py::test_beyond_the_end_of_the_line_they_are_sent_away_the_guesser_first",
    ),
    Bound(
        _CLIENT,
        "addresses and names with failed logins, and with good ones, that are remembered",
        ("otel_smtp.server.failure_rate.MOST_ADDRESSES", "otel_smtp.server.guesses.MOST_KNOWN"),
        "the oldest are forgotten",
        "tests/server/test_guesses.py::test_what_is_remembered_is_bounded",
    ),
    Bound(
        _CLIENT,
        "passwords that are hashed at once; the rest waits",
        ("otel_smtp.server.users.HASHING_THREADS",),
        "they wait",
        "tests/server/test_users.py::test_no_more_passwords_are_hashed_at_once_than_allowed",
    ),
    # A message
    Bound(
        _CLIENT,
        "octets of a message",
        ("limits.message_size",),
        "552; read off within a bound",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _CLIENT,
        "octets of a message in memory",
        ("otel_smtp.forwarding.settings.MEMORY_LIMIT_OCTETS",),
        "a file without a name",
        "tests/end_to_end/test_exhaustion.py::test_large_messages_side_by_side_stand_in_files_and_not_in_memory",
    ),
    Bound(_CLIENT, "octets of a text line", ("limits.text_line",), "554", f"{_DRIVEN}test_far_beyond_a_bound"),
    Bound(
        _CLIENT,
        "the header block",
        ("limits.header_size", "limits.header_lines"),
        "554",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(_CLIENT, "Received fields", ("limits.hops",), "554", f"{_DRIVEN}test_far_beyond_a_bound"),
    Bound(_CLIENT, "recipients", ("limits.recipients",), "452", f"{_DRIVEN}test_far_beyond_a_bound"),
    Bound(
        _CLIENT,
        "refused recipients that are reported one by one",
        ("otel_smtp.observing.records.MOST_REFUSED",),
        "counted",
        "tests/telemetry/test_recipients.py::test_at_most_fifty_are_events_and_then_one_counts_the_rest",
    ),
    # What telemetry keeps of it
    Bound(
        _CLIENT,
        "events of a span, between transactions; four times as many wherever it is",
        ("telemetry.segment_events", "telemetry.segment_age"),
        "a new span, linked to the one before",
        "tests/server/test_session.py::test_within_a_transaction_a_record_is_bounded_too",
    ),
    Bound(
        _CLIENT,
        "characters of an attribute",
        ("otel_smtp.telemetry.attributes.MAX_VALUE_CHARACTERS",),
        "cut",
        "tests/client/test_reply_words.py::test_any_text_is_shown_within_the_bound",
    ),
    Bound(
        _CLIENT,
        "domains on a span",
        ("otel_smtp.telemetry.attributes.MAX_DOMAINS",),
        "left out",
        "tests/telemetry/test_redaction.py::test_domains_of_recipients_are_the_first_few_distinct_ones",
    ),
    Bound(
        _CLIENT,
        "domains, and kinds of spans and events, that are kept encoded",
        ("otel_smtp.telemetry.ordinary.MAX_DOMAINS_KEPT", "otel_smtp.telemetry.shapes.MAX_SHAPES"),
        "all are forgotten, or made each time",
        "tests/bounds/drives.py::mail_of_many_domains",
    ),
    Bound(
        _CLIENT,
        "log lines alike in a second",
        ("otel_smtp.telemetry.logs.LINES_A_SECOND",),
        "counted in one line",
        "tests/end_to_end/test_exhaustion.py::test_a_flood_of_connections_is_survived_with_64_files",
    ),
    Bound(
        _CLIENT,
        "octets of traces in memory, and of those in which something failed",
        ("otel_smtp.status.traces.RECENT_OCTETS", "otel_smtp.status.traces.FAILED_OCTETS"),
        "the oldest go",
        "tests/status/test_traces.py::test_the_bound_on_octets_counts_what_is_beside_them_too",
    ),
    # Upstreams
    Bound(
        _UPSTREAM,
        "octets of a reply's line",
        ("upstream.reply_line",),
        "closed; 451",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _UPSTREAM,
        "lines of a reply",
        ("upstream.reply_lines",),
        "closed; 451",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(_UPSTREAM, "connections to it", ("upstream.connections",), "mail waits", _LIMITS),
    Bound(_UPSTREAM, "connections of all gateways", ("upstream.connections_total",), "mail waits", _LIMITS),
    Bound(
        _UPSTREAM,
        "the time that it takes",
        (
            "upstream.timeout.connect",
            "upstream.timeout.greeting",
            "upstream.timeout.command",
            "upstream.timeout.data",
            "upstream.timeout.block",
            "upstream.timeout.reply",
        ),
        "451",
        _LIMITS,
    ),
    Bound(
        _UPSTREAM,
        "phases of an attempt",
        ("otel_smtp.observing.records.MOST_PHASES",),
        "the last stands for all",
        "tests/end_to_end/test_budgets.py::test_a_message_to_a_thousand_recipients",
    ),
    Bound(
        _UPSTREAM,
        "mail that waits in the spool",
        ("spool.most_messages", "spool.most_octets"),
        "452 4.3.1",
        f"{_DRIVEN}test_a_spool_takes_no_more_than_it_may",
    ),
    # Collectors
    Bound(
        _COLLECTOR,
        "octets of telemetry that wait to be exported",
        ("otel_smtp.telemetry.exporting.LEAST_QUEUE_OCTETS",),
        "dropped and counted",
        f"{_DRIVEN}test_a_collector_that_takes_nothing",
    ),
    Bound(
        _COLLECTOR,
        "octets of a collector's answer",
        ("otel_smtp.telemetry.exchange_bounds.MAX_REPLY_OCTETS",),
        "closed",
        "tests/telemetry/test_collector.py::test_an_answer_that_floods_us_is_left",
    ),
    Bound(
        _COLLECTOR,
        "pieces in which a collector's answer may come",
        ("otel_smtp.telemetry.exchange_bounds.MAX_REPLY_PIECES",),
        "closed",
        "tests/telemetry/test_collector.py::test_an_answer_in_countless_pieces_is_left",
    ),
    # Receivers of outcomes
    Bound(
        _RECEIVER,
        "outcomes that wait for it",
        ("notify.most_pending",),
        "dropped and counted; mail goes on",
        "tests/spool/outcomes/test_recording.py::test_beyond_the_bound_mail_ends_as_ever_and_outcomes_are_dropped",
    ),
    Bound(
        _RECEIVER,
        "the time that a receiver takes",
        ("notify.timeout",),
        "closed; sent again",
        "tests/spool/outcomes/test_posting.py::test_a_receiver_that_drips_its_answer_is_left_at_the_deadline",
    ),
    Bound(
        _RECEIVER,
        "requests to it at once",
        ("notify.connections",),
        "outcomes wait",
        "tests/spool/outcomes/test_sending.py::test_a_receiver_that_fails_is_asked_with_one_at_a_time",
    ),
    Bound(
        _RECEIVER,
        "octets of a receiver's answer",
        ("otel_smtp.spool.outcomes.posting.MOST_ANSWER_OCTETS",),
        "closed",
        "tests/spool/outcomes/test_posting.py::test_an_answer_beyond_the_bound_is_not_read_to_its_end",
    ),
    # Readers
    Bound(
        _READER,
        "connections, and those of one address",
        ("otel_smtp.status.http.HTTP_CONNECTIONS", "otel_smtp.status.http.HTTP_CONNECTIONS_PER_CLIENT"),
        "the oldest that asks nothing goes",
        f"{_DRIVEN}test_silent_connections_to_the_status_port_keep_no_probe_out",
    ),
    Bound(
        _READER,
        "seconds until a request is complete, and until its answer is read",
        ("otel_smtp.status.http.REQUEST_SECONDS", "otel_smtp.status.http.ANSWER_SECONDS"),
        "closed",
        "tests/status/test_server.py::test_an_answer_that_is_not_read_is_given_up",
    ),
    Bound(
        _READER,
        "requests in a second, and at once",
        ("otel_smtp.status.answers.REQUESTS_PER_SECOND", "otel_smtp.status.answers.REQUESTS_AT_ONCE"),
        "they wait; probes have a pace of their own",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _READER,
        "answers that are kept",
        ("otel_smtp.status.answers.KEPT_ANSWERS",),
        "the oldest goes",
        "tests/status/test_server.py::test_what_is_kept_is_forgotten",
    ),
    Bound(
        _READER,
        "streams of the page, and followers",
        ("otel_smtp.status.server.STREAMS", "otel_smtp.status.following.FOLLOWERS"),
        "503",
        "tests/status/test_server.py::test_streams_are_bounded_and_a_closed_one_makes_room",
    ),
    Bound(
        _LOG_READER,
        "octets of log lines that nobody reads",
        ("otel_smtp.telemetry.line_output.HELD_OCTETS",),
        "lines are lost and counted; mail never waits",
        "tests/telemetry/test_line_output.py::test_a_reader_that_has_stopped_costs_lines_and_never_time",
    ),
    # Neighbours
    Bound(
        _NEIGHBOUR,
        "connections of one owner on this machine, while another wants one",
        ("limits.connections",),
        "the one least missed gives way",
        f"{_DRIVEN}test_a_neighbour_that_takes_all_connections_keeps_no_mail_out",
    ),
    Bound(
        _NEIGHBOUR,
        "part of the connections that may wait in line for one, and seconds that they wait",
        ("otel_smtp.server.places.LINE_PART", "otel_smtp.server.places.IN_LINE_SECONDS"),
        "421",
        "tests/server/test_listener.py::test_of_one_owner_those_that_do_nothing_give_way_one_after_the_other",
    ),
    Bound(
        _NEIGHBOUR,
        "octets of a request to the spool's socket",
        ("otel_smtp.spool.operators.MOST_REQUEST_OCTETS",),
        "closed",
        f"{_DRIVEN}test_far_beyond_a_bound",
    ),
    Bound(
        _NEIGHBOUR,
        "queue commands at once, seconds until one is sent, and until its answer is read",
        (
            "otel_smtp.spool.operators.MOST_CONVERSATIONS",
            "otel_smtp.spool.operators.REQUEST_SECONDS",
            "otel_smtp.spool.operators.ANSWER_SECONDS",
        ),
        "refused; closed",
        "tests/spool/test_operators.py::test_so_many_queue_commands_are_heard_at_once",
    ),
)
