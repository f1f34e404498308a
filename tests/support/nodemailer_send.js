// Sends one mail by nodemailer: what standard input tells, as JSON.
//
//     {"options": for createTransport, "envelope": {"from": ..., "to": [...]}, "file": the message in wire form}
"use strict";

const fs = require("fs");
const nodemailer = require("nodemailer");

async function main() {
    const told = JSON.parse(fs.readFileSync(0, "utf8"));
    if (told.options.tls && told.options.tls.ca) {
        told.options.tls.ca = fs.readFileSync(told.options.tls.ca);
    }
    const transport = nodemailer.createTransport(told.options);
    const sent = await transport.sendMail({ envelope: told.envelope, raw: fs.readFileSync(told.file) });
    process.stdout.write(JSON.stringify({ response: sent.response, accepted: sent.accepted, rejected: sent.rejected }));
}

main().catch((error) => {
    process.stderr.write(`${error.message}\n`);
    process.exitCode = 1;
});
