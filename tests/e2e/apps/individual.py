"""Answers with what must be this VM's own, and with what is in its folder."""

import json
import os
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Drawn once, at the start.
URANDOM = os.urandom(16).hex()
UUID = str(uuid.uuid4())


def text(path):
    with open(path) as file:
        return file.read().strip()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        files = {entry.name: entry.stat().st_size for entry in os.scandir("/app")}
        data = json.dumps(
            {
                "machine_id": text("/etc/machine-id"),
                "boot_id": text("/proc/sys/kernel/random/boot_id"),
                "urandom": URANDOM,
                "uuid": UUID,
                "folder": files,
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form, *arguments):
        print(form % arguments, flush=True)


ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
