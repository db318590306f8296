"""Answers with its own name on every line, streams, echoes and waits, and logs what it saw."""

import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = os.environ["SPORE_APP"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        print("saw", self.command, self.path, flush=True)
        if self.path == "/events":
            self.events()
        elif self.path.startswith("/slow"):
            time.sleep(120)
            self.answer(b"slow")
        elif self.path.startswith("/large/"):
            self.large(int(self.path.split("/")[2]))
        else:
            with open("/proc/sys/kernel/random/boot_id") as file:
                self.answer(f"{NAME} {file.read().strip()}".encode())

    def do_POST(self):
        print("saw", self.command, self.path, flush=True)
        length = int(self.headers["Content-Length"])
        if self.path.startswith("/slow"):
            self.rfile.read(length)
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        while length:
            data = self.rfile.read(min(length, 65536))
            self.wfile.write(data)
            length -= len(data)

    def events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"data: first\n\n")
        # The second one waits until somebody who has read the first one asks for it.
        while not os.path.exists("/tmp/go-on"):
            time.sleep(0.05)
        self.wfile.write(b"data: second\n\n")
        self.close_connection = True

    def large(self, mib):
        self.send_response(200)
        self.send_header("Content-Length", str(mib << 20))
        self.end_headers()
        piece = bytes(range(256)) * 256
        for _ in range(mib << 4):
            self.wfile.write(piece)

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, form, *arguments):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


Server(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
