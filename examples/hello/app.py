"""Says hello, and how often since this VM started: asleep and awake again, it counts from one."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

visits = count(1)


class Hello(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        release = os.environ.get("SPORE_RELEASE", "?")
        body = f"hello from release {release}, visit {next(visits)} of this VM\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"listening on {port}", flush=True)
    ThreadingHTTPServer(("", port), Hello).serve_forever()
