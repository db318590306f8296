"""Answers with what it drew when it started, and with what it draws for each request."""

import json
import os
import random
import ssl
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = 1
# Drawn once: whoever says the same began from the same memory.
STARTED = uuid.uuid4().hex
SEEDED = random.Random(STARTED)
# What a process has used once it goes on with from its memory.
random.random()
ssl.RAND_bytes(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with open("/etc/machine-id") as file:
            machine_id = file.read().strip()
        drawn = {
            "random": repr(random.random()),
            "seeded": repr(SEEDED.random()),
            "openssl": ssl.RAND_bytes(16).hex(),
            "uuid": str(uuid.uuid4()),
            "urandom": os.urandom(16).hex(),
            "machine_id": machine_id,
        }
        told = {"version": VERSION, "started": STARTED, "now": time.time(), "own": drawn}
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form, *arguments):
        pass


print("started", flush=True)
ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
