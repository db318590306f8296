"""Keeps connections open, outside and inside its VM, and tells what became of them.

/call?to=ADDRESS:PORT&name=NAME opens one and keeps it; /keep?value=VALUE remembers something;
/tell?name=NAME tells what was remembered, how that connection fared, and what came back on the
one whose both ends are here.
"""
import http.server
import json
import os
import socket
import threading
import urllib.parse

PATIENCE_S = 60

CALLS = {}
KEPT = None


class Call:
    """One connection to the outside, and a thread that reads from it all the time."""

    def __init__(self, to, name):
        host, _, port = to.rpartition(":")
        self.stream = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self.stream.settimeout(None)
        self.stream.sendall(f"{name}\n".encode())
        self.welcome = self.stream.recv(100).decode()
        self.end = None
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        try:
            said = self.stream.recv(100)
            self.end = f"said {said.decode()}" if said else "closed"
        except OSError as error:
            self.end = type(error).__name__

    def fared(self):
        """How it ended; whether it has, is awaited only by who knows that it must have."""
        self.reader.join(PATIENCE_S)
        return self.end or "still open"


def inside():
    """Both ends of a connection over the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


ONE, OTHER = inside()


def across():
    """What arrives at the one end of what is sent at the other."""
    ONE.settimeout(PATIENCE_S)
    try:
        OTHER.sendall(b"across")
        return ONE.recv(100).decode()
    except OSError as error:
        return type(error).__name__


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global KEPT
        url = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        told = {}
        if url.path == "/keep":
            KEPT = asked["value"]
        if url.path == "/call":
            call = CALLS[asked["name"]] = Call(asked["to"], asked["name"])
            told["welcome"] = call.welcome
        if url.path == "/tell":
            told["kept"] = KEPT
            told["fared"] = CALLS[asked["name"]].fared()
            told["inside"] = across()
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("", int(os.environ["PORT"])), Handler)
server.serve_forever()
