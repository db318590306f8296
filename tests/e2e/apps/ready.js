// Answers with what it drew when it started, and with what it draws for each request.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const http = require("http");

const VERSION = 1;
// Drawn once: whoever says the same began from the same memory.
const STARTED = crypto.randomUUID();

function own() {
  return {
    random: Math.random(),
    integer: crypto.randomInt(2 ** 47),
    openssl: crypto.randomBytes(16).toString("hex"),
    uuid: crypto.randomUUID(),
    boot_id: fs.readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim(),
    machine_id: fs.readFileSync("/etc/machine-id", "utf8").trim(),
  };
}

// What a process has used once it goes on with from its memory.
own();
const server = http.createServer((_request, response) => {
  const told = { version: VERSION, started: STARTED, now: Date.now() / 1000, own: own() };
  response.end(JSON.stringify(told));
});
console.log("started");
server.listen(Number(process.env.PORT), "0.0.0.0");
