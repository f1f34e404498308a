// A relay from Nodemailer's parts: smtp-server in front, a pooled Nodemailer transport behind; content is streamed.
//
//     node nodemailer_relay.js PORT UPSTREAM_PORT

const { SMTPServer } = require("smtp-server");
const nodemailer = require("nodemailer");

const [port, upstreamPort] = process.argv.slice(2).map(Number);

const upstream = nodemailer.createTransport({
  host: "127.0.0.1",
  port: upstreamPort,
  ignoreTLS: true,
  pool: true,
  maxConnections: 20,
  maxMessages: Infinity,
});

const server = new SMTPServer({
  disabledCommands: ["AUTH", "STARTTLS"],
  disableReverseLookup: true,
  size: 100 * 1024 * 1024,
  logger: false,
  onData(stream, session, done) {
    const { mailFrom, rcptTo } = session.envelope;
    const envelope = { from: mailFrom.address, to: rcptTo.map((recipient) => recipient.address) };
    upstream.sendMail({ envelope, raw: stream }, (error, info) => {
      if (error) {
        stream.resume();
        const refusal = new Error("Upstream failed");
        refusal.responseCode = 451;
        done(refusal);
      } else {
        done(null, info.response);
      }
    });
  },
});

server.listen(port, "127.0.0.1", 1024);
process.on("SIGTERM", () => process.exit(0));
