// Makes the random numbers of this process its own again when its VM was forked.
//
// Loaded first by `--require` (NODE_OPTIONS), in each thread. Waits for the agent's word on a
// connection that keeps no process alive. A program that could not hear of a fork would share its
// keys with others, so it does not start. Outside of a VM of Spore there is nothing to hear.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const net = require("net");

const SOCKET = "/run/spore/agent.sock";
const ADDON = "/run/spore/lib/spore_hook.node";

// How many values Node.js draws in advance, at most.
const UUIDS_KEPT = 128;
const INTEGERS_KEPT = 1024;

const hooks = [];

// V8's own generator cannot be seeded anew, so Math.random is this one (sfc32).
const state = new Uint32Array(4);

function next() {
  const sum = (state[0] + state[1] + state[3]) >>> 0;
  state[3] += 1;
  state[0] = state[1] ^ (state[1] >>> 9);
  state[1] = state[2] + (state[2] << 3);
  state[2] = ((state[2] << 21) | (state[2] >>> 11)) + sum;
  return sum;
}

crypto.randomFillSync(state);
Math.random = function random() {
  return ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
};

// Has `hook(incarnation)` called in each fork, before its network opens.
function register(hook) {
  hooks.push(hook);
  return hook;
}

// What JavaScript cannot do.
function load() {
  const addon = { exports: {} };
  try {
    process.dlopen(addon, ADDON);
    return addon.exports;
  } catch (cause) {
    const what = "This Node.js cannot draw random numbers of its own in a fork of its VM";
    throw new Error(`${what} (${cause.message}): run it without ${__filename}`, { cause });
  }
}

// Whether every hook did its work; each is given the chance.
function run(forked) {
  let isDone = true;
  for (const hook of hooks) {
    try {
      hook(forked);
    } catch (error) {
      console.error(error);
      isDone = false;
    }
  }
  return isDone;
}

function hear(agent, line) {
  const { forked, error } = JSON.parse(line);
  if (error !== undefined) console.error(`spore: this process hears of no fork: ${error}`);
  if (forked !== undefined && run(forked)) agent.write('{"done":true}\n');
}

function listen() {
  const { ask, reseed } = load();
  register(() => {
    reseed();
    for (let drawn = 0; drawn < UUIDS_KEPT; drawn++) crypto.randomUUID();
    for (let drawn = 0; drawn < INTEGERS_KEPT; drawn++) crypto.randomInt(2 ** 47);
    crypto.randomFillSync(state);
  });
  const agent = new net.Socket({ fd: ask(), readable: true, writable: true });
  let heard = "";
  agent.unref();
  agent.setEncoding("utf8");
  agent.on("error", () => {});
  agent.on("data", (text) => {
    const lines = (heard + text).split("\n");
    heard = lines.pop();
    for (const line of lines) hear(agent, line);
  });
}

if (fs.existsSync(SOCKET)) listen();

module.exports = { register };
