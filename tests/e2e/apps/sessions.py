"""Counts requests and keeps who logged in, in memory and nowhere else."""
import http.server
import json
import os
import secrets
import time
import urllib.parse

COUNT = 0
SESSIONS = {}
PROCESS = secrets.token_hex(8)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global COUNT
        COUNT += 1
        url = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        told = {"count": COUNT, "process": PROCESS, "now": time.time()}
        if url.path == "/login":
            told["session"] = secrets.token_hex(16)
            SESSIONS[told["session"]] = asked["user"]
        if url.path == "/who":
            told["user"] = SESSIONS.get(asked["session"])
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("", int(os.environ["PORT"])), Handler)
server.serve_forever()
