// Says a line of what must be its VM's own to whoever connects, and then what it knows to share.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const net = require("net");
const tls = require("tls");
const { spawn } = require("child_process");
const { once } = require("events");
const { Duplex } = require("stream");
const { promisify } = require("util");
const { Worker } = require("worker_threads");

const forks = [];
require("/run/spore/lib/spore_after_fork.js").register((name) => forks.push(name));

const started = crypto.randomUUID();
const randomBytes = promisify(crypto.randomBytes);
const text = (path) => fs.readFileSync(path, "utf8").trim();

// The random number and the session that a handshake begins with.
function hello() {
  return new Promise((heard) => {
    const socket = new Duplex({
      read() {},
      write(record, _encoding, done) {
        heard([record.subarray(11, 43), record.subarray(44, 76)]);
        done();
      },
    });
    tls.connect({ socket, servername: "notes.test" }).on("error", () => {});
  });
}

function urandom() {
  const bytes = Buffer.alloc(16);
  const file = fs.openSync("/dev/urandom");
  fs.readSync(file, bytes);
  fs.closeSync(file);
  return bytes;
}

async function own() {
  const bytes = [urandom(), crypto.randomBytes(16), await randomBytes(16), ...(await hello())];
  return [
    ...bytes.map((some) => some.toString("hex")),
    Math.random(),
    crypto.randomInt(2 ** 47),
    crypto.randomUUID(),
    text("/etc/machine-id"),
    text("/proc/sys/kernel/random/boot_id"),
  ];
}

// A thread that draws for itself.
const THREAD = `
  const crypto = require("crypto");
  const { parentPort } = require("worker_threads");
  parentPort.on("message", () => {
    const bytes = crypto.randomBytes(16).toString("hex");
    parentPort.postMessage([bytes, crypto.randomUUID(), Math.random()]);
  });`;

// A process that is too busy to hear of anything.
const BUSY = `
  process.stdout.write("busy");
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);`;

async function threads() {
  if (process.env.ONE_THAT_NEVER_ANSWERS === undefined) return async () => [];
  await once(spawn(process.execPath, ["-e", BUSY]).stdout, "data");
  const thread = new Worker(THREAD, { eval: true });
  return async () => {
    const said = once(thread, "message");
    thread.postMessage("draw");
    return (await said)[0];
  };
}

async function main() {
  const others = await threads();
  const all = async () => [...(await own()), ...(await others())];
  const server = net.createServer(async (asks) => {
    asks.on("error", () => {});
    asks.end([...(await all()), "|", started, ...forks].join(" "));
  });
  await all();
  server.listen(Number(process.env.PORT), "0.0.0.0");
}

main();
