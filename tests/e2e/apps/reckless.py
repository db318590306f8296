"""Does to its own VM what it is asked to: floods, fills, eats, forks.

Serves one request at a time in one thread, so that it needs no new thread to answer.
"""

import errno
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

MIB = 1 << 20


def fork():
    """A process, once there may be one more: the ended ones count until they are collected."""
    while True:
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.01)


def orphans(count):
    """So many processes whose parent is gone and that then end: PID 1 must collect each."""
    left = count
    while left:
        some = min(left, 100)
        parent = fork()
        if parent == 0:
            for _ in range(some):
                if fork() == 0:
                    os._exit(0)
            os._exit(0)
        os.waitpid(parent, 0)
        left -= some
    return {"orphans": count}


def threads(count):
    """As many threads as the kernel gives, at most so many; they stay."""
    threading.stack_size(64 * 1024)
    made = 0
    for _ in range(count):
        try:
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        except RuntimeError as error:
            return {"threads": made, "error": str(error)}
        made += 1
    return {"threads": made}


def bomb():
    """Processes that make processes that make processes, in a child."""
    if os.fork():
        return {"bomb": "lit"}
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def flood(mib):
    """Prints so much as fast as it can, in a child that ends then."""
    if os.fork():
        return {"flood_mib": mib}
    filler = (b"x" * 1023 + b"\n") * 1023
    for piece in range(mib):
        end = b"%05d end of the flood" % piece
        data = memoryview(filler + end.rjust(1023) + b"\n")
        while data:
            data = data[os.write(1, data):]
    os._exit(0)


def fill(path):
    """Writes until the disk is full."""
    written = 0
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                written += file.write(bytes(MIB))
            except OSError as error:
                return {"written_mib": written // MIB, "error": errno.errorcode[error.errno]}


def eat(mib):
    """Takes so much memory and uses it."""
    held = []
    for _ in range(mib):
        held.append(os.urandom(4096) * 256)
    return {"held_mib": len(held)}


def seen():
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    states = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        states[state] = states.get(state, 0) + 1
    return {"boot_id": boot_id, "pid": os.getpid(), "processes": states}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        verb, _, argument = self.path.strip("/").partition("/")
        found = {
            "": seen,
            "orphans": lambda: orphans(int(argument)),
            "bomb": bomb,
            "threads": lambda: threads(int(argument)),
            "flood": lambda: flood(int(argument)),
            "fill": lambda: fill("/" + argument),
            "eat": lambda: eat(int(argument)),
        }[verb]()
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form, *arguments):
        pass


HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
