-- A role that sees the queue and no content of mail: `otel-smtp queue list, show, find, shape, counts, gateways`.
-- Run by the owner after `otel-smtp queue migrate`, and after each later one:
--   psql -v ON_ERROR_STOP=1 -f reader.sql "postgresql://otel_smtp_owner@db.example.com/mail"
-- The role itself is made by a superuser: CREATE ROLE otel_smtp_reader LOGIN PASSWORD '...';
GRANT USAGE ON SCHEMA otel_smtp TO otel_smtp_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA otel_smtp TO otel_smtp_reader;
REVOKE SELECT ON otel_smtp.chunk, otel_smtp.msg FROM otel_smtp_reader;
GRANT SELECT (id, kind, arrived_at, expires_at, warned, held_at, forced, reverse_path, parameters, carrier, trace_id,
  accepted_by, octets, header_octets, digest) ON otel_smtp.msg TO otel_smtp_reader;
