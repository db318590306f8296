"""Answers with what this VM is, so that a story can tell one from another."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COUNT = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global COUNT
        COUNT += 1
        if self.path.startswith("/env/"):
            body = os.environ.get(self.path[5:], "")
        elif self.path == "/crash":
            os._exit(3)
        else:
            with open("/proc/sys/kernel/random/boot_id") as file:
                boot_id = file.read().strip()
            body = json.dumps({"boot_id": boot_id, "count": COUNT, "uid": os.getuid()})
        data = body.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form, *arguments):
        print(form % arguments, flush=True)


ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
