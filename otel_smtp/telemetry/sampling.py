"""Ids and sampling decisions, both by OpenTelemetry's own objects."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import getrandbits
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.span import TraceState

from otel_smtp.telemetry.attributes import SAMPLING_REASON, Attributes
from otel_smtp.telemetry.propagation import RANDOM, SAMPLED, TraceContext, around_span_id, carrier
from otel_smtp.telemetry.records import LinkRecord
from otel_smtp.telemetry.sdk import Decision, IdGenerator, RandomIdGenerator, Sampler
from otel_smtp.telemetry.shapes import SpanShape

# Of these the decision for a child of our own span follows from the span's, so the sampler need not be asked again.
_STATIC: Final = ("AlwaysOnSampler", "AlwaysOffSampler", "TraceIdRatioBased{")
_PARENT_BASED: Final = "localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler"
# Likewise for a span made elsewhere, or by us earlier: the parent of mail from the spool.
_REMOTELY_BASED: Final = "remoteParentSampled:AlwaysOnSampler,remoteParentNotSampled:AlwaysOffSampler"

_NOTHING: Final[Attributes] = {}
# A NamedTuple's own constructor is a function in Python; each mail has two of these.
_context: Final = partial(tuple.__new__, TraceContext)


class Identity:
    """Which span it is, where it stands, and what was decided about it: known from its beginning, or soon after.

    Attributes:
        attributes: what the sampler adds.
        is_kept: the sampler dropped it, and it is exported all the same; spans that inherit its flags are not.
        failure: of a connection's segment, the shape of a transaction's span in it that failed.
    """

    __slots__ = ("attributes", "context", "failure", "is_kept", "is_recording", "links", "parent")

    def __init__(
        self,
        context: TraceContext,
        parent: TraceContext | None,
        links: Sequence[LinkRecord] = (),
        *,
        is_recording: bool,
        attributes: Attributes = _NOTHING,
    ) -> None:
        self.context = context
        self.parent = parent
        self.links = links
        self.is_recording = is_recording
        self.attributes = attributes
        self.is_kept = False
        self.failure: SpanShape | None = None

    def keep(self, reason: str) -> None:
        """Have it exported though the sampler dropped it."""
        if not self.is_recording:
            self.is_recording = self.is_kept = True
            self.attributes = {**self.attributes, SAMPLING_REASON: reason}


class SegmentIdentity(Identity):
    """That of a connection's segment, below which many transactions stand.

    Attributes:
        trace_text: its trace id in hexadecimal; "" before it is first asked for, as an idle connection needs none.
        traceparent: see `propagation.around_span_id`; None before the first mail that is to carry it.
        carrier: its own context as header fields; None before they are first asked for.
        octets: its trace id, its span id, and the attribute that names the connection, as `ordinary` writes them; None
            before the first mail.
    """

    __slots__ = ("carrier", "octets", "trace_text", "traceparent")

    def __init__(self, identity: Identity) -> None:
        super().__init__(
            identity.context,
            identity.parent,
            identity.links,
            is_recording=identity.is_recording,
            attributes=identity.attributes,
        )
        self.trace_text = ""
        self.traceparent: tuple[str, str] | None = None
        self.carrier: Mapping[str, str] | None = None
        self.octets: tuple[bytes, bytes, bytes] | None = None

    def tell_trace(self) -> str:
        """Its trace id in hexadecimal."""
        self.trace_text = self.context.trace_id_hex
        return self.trace_text

    def tell_traceparent(self) -> tuple[str, str]:
        """See `propagation.around_span_id`."""
        self.traceparent = around_span_id(self.context)
        return self.traceparent

    def tell_carrier(self) -> Mapping[str, str]:
        """Its own context as header fields."""
        self.carrier = carrier(self.context)
        return self.carrier


class Sampling:
    """Makes the identities of new spans.

    Attributes:
        inherits_ours: a child of a span of ours does as that does.
        new_span_id: makes the id of a span.
    """

    __slots__ = (
        "_generate_trace_id",
        "_inherits",
        "_root_flags",
        "_sampler",
        "inherits_ours",
        "new_span_id",
    )
    _inherits: Mapping[bool, bool]  # whether a child does as its parent did, by whether that is remote

    def __init__(self, sampler: Sampler, id_generator: IdGenerator) -> None:
        self._sampler = sampler
        self._generate_trace_id = id_generator.generate_trace_id
        has_own_ids = type(id_generator) is not RandomIdGenerator
        self.new_span_id: Callable[[], int] = id_generator.generate_span_id if has_own_ids else _random_span_id
        self._root_flags = RANDOM if id_generator.is_trace_id_random() else 0
        description = sampler.get_description()
        is_parent_based = description.startswith("ParentBased{")
        self._inherits = inherits = {
            False: description.startswith(_STATIC) or (is_parent_based and _PARENT_BASED in description),
            True: is_parent_based and _REMOTELY_BASED in description,
        }
        self.inherits_ours = inherits[False]

    def inherit(self, parent: TraceContext) -> Identity | None:
        """A new span below `parent` that does as that does; None if the sampler must be asked. It has no links."""
        trace_id, _, flags, is_remote, state = parent
        if not self._inherits[is_remote]:
            return None
        identity = Identity.__new__(Identity)
        identity.context = _context((trace_id, self.new_span_id(), flags, False, state))
        identity.parent = parent
        identity.links = ()
        identity.is_recording = flags & SAMPLED != 0
        identity.attributes = _NOTHING
        identity.is_kept = False
        identity.failure = None
        return identity

    def decide(
        self,
        name: str,
        kind: SpanKind,
        parent: TraceContext | None,
        at_start: Callable[[], Attributes],
        links: Sequence[LinkRecord] = (),
    ) -> Identity:
        """A new span below `parent`, a root where it is None.

        Args:
            at_start: the attributes that are known at its start, asked for if the sampler is: it sees no others.
        """
        if parent is not None and self._inherits[parent.is_remote]:
            trace_id, _, flags, _, state = parent
            context = TraceContext(trace_id, self.new_span_id(), flags, False, state)
            return Identity(context, parent, links, is_recording=bool(flags & SAMPLED))
        attributes = at_start()
        trace_id = self._generate_trace_id() if parent is None else parent.trace_id
        result = self._sampler.should_sample(
            _as_current(parent), trace_id, name, kind, attributes, [sdk_link(link) for link in links]
        )
        flags = (self._root_flags if parent is None else parent.flags & RANDOM) | (
            SAMPLED if result.decision is Decision.RECORD_AND_SAMPLE else 0
        )
        state = "" if result.trace_state is None else result.trace_state.to_header()
        added = {key: value for key, value in result.attributes.items() if key not in attributes}
        return Identity(
            TraceContext(trace_id, self.new_span_id(), flags, False, state),
            parent,
            links,
            is_recording=result.decision is not Decision.DROP,
            attributes=added or _NOTHING,
        )


def _random_span_id() -> int:
    """As RandomIdGenerator has it, in one call and not three: it must not be 0."""
    return getrandbits(64) or 1


def _as_current(parent: TraceContext | None) -> Context:
    # An empty context, never None: None would mean whatever span happens to be current.
    return Context() if parent is None else set_span_in_context(NonRecordingSpan(sdk_context(parent)), Context())


def sdk_context(context: TraceContext) -> SpanContext:
    """`context` as the SDK's type."""
    state = TraceState.from_header([context.trace_state]) if context.trace_state else None
    return SpanContext(context.trace_id, context.span_id, context.is_remote, TraceFlags(context.flags), state)


def sdk_link(link: LinkRecord) -> Link:
    """`link` as the SDK's type."""
    return Link(sdk_context(link.context), link.attributes)
