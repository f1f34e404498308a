-- The roles of a queue that several gateways share, run once by a superuser in the database that will hold it:
--   QUEUE_PASSWORDS=DIRECTORY psql -v ON_ERROR_STOP=1 -f roles.sql mail
-- DIRECTORY has a file with the password of each: owner, gateway. (The image of PostgreSQL runs it at its first start.)
--
--   otel_smtp_owner    owns the schema; `otel-smtp queue migrate` and nothing else
--   otel_smtp_gateway  what gateways and `otel-smtp queue` run as: rows, no tables
\set ON_ERROR_STOP on
\set owner_password `cat "$QUEUE_PASSWORDS/owner"`
\set gateway_password `cat "$QUEUE_PASSWORDS/gateway"`

CREATE ROLE otel_smtp_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE otel_smtp_gateway LOGIN PASSWORD :'gateway_password';
-- No commit of theirs may be answered before it is durable, whatever the server's default is.
ALTER ROLE otel_smtp_gateway SET synchronous_commit = on;

SELECT format('GRANT CREATE, CONNECT ON DATABASE %I TO otel_smtp_owner', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO otel_smtp_gateway', current_database()) \gexec
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec

CREATE SCHEMA otel_smtp AUTHORIZATION otel_smtp_owner;
GRANT USAGE ON SCHEMA otel_smtp TO otel_smtp_gateway;
-- Also of the tables that a later version brings. (What version the schema has, `queue migrate` lets only its owner write.)
ALTER DEFAULT PRIVILEGES FOR ROLE otel_smtp_owner IN SCHEMA otel_smtp
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO otel_smtp_gateway;
