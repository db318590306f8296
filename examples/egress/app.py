"""Calls the one host that the manifest grants, or another that is named, and tells what came."""

import os
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


def call(host):
    try:
        connection = HTTPSConnection(host, timeout=10)
        connection.request("GET", "/")
        return f"{host} answered {connection.getresponse().status}\n"
    except OSError as error:
        return f"{host} is out of reach: {error}\n"


class Caller(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        host = parse_qs(urlsplit(self.path).query).get("host", ["example.org"])[0]
        body = call(host).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    ThreadingHTTPServer(("", port), Caller).serve_forever()
