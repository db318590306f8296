"""Tries what it is asked to reach and tells what came of it: `/?to=ADDRESS:PORT&name=NAME`.

`&patience=SECONDS` says how long each may take.
"""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


def connect(target, patience):
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=patience) as stream:
            # Whoever is there speaks first, or says something to this.
            stream.sendall(b"hello?\r\n\r\n")
            said = stream.recv(100).decode("latin-1")
            return f"answered {said}" if said else "closed"
    except OSError as error:
        return f"failed: {error}"


def resolve(name):
    try:
        return "resolved " + socket.gethostbyname(name)
    except OSError as error:
        return f"failed: {error}"


class Prober(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        wanted = parse_qs(urlsplit(self.path).query)
        patience = int(wanted.get("patience", ["5"])[0])
        jobs = [(lambda to: connect(to, patience), to) for to in wanted.get("to", [])]
        jobs += [(resolve, name) for name in wanted.get("name", [])]
        with ThreadPoolExecutor(len(jobs) or 1) as pool:
            found = list(pool.map(lambda job: job[0](job[1]), jobs))
        body = json.dumps(dict(zip([what for _, what in jobs], found))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form, *arguments):
        pass


ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Prober).serve_forever()
