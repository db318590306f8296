"""Keeps notes in memory for whoever knows the password, which comes as a secret."""

import base64
import hmac
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PASSWORD = os.environ["NOTES_PASSWORD"]
NOTE_BYTES_MAX = 4096
NOTES_MAX = 1000
notes = []


class Notes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.allowed():
            self.answer(200, "".join(f"{note}\n" for note in notes))

    def do_POST(self):
        if not self.allowed():
            return
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= NOTE_BYTES_MAX or len(notes) >= NOTES_MAX:
            self.close_connection = True
            self.answer(413, "a note has 1 to 4096 bytes, and there are 1000 at most\n")
            return
        notes.append(self.rfile.read(length).decode("utf-8", "replace").strip())
        self.answer(201, "noted\n")

    def allowed(self):
        given = self.headers.get("Authorization", "")
        wanted = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if hmac.compare_digest(given.encode(), wanted.encode()):
            return True
        self.close_connection = True
        self.answer(401, "use: curl -u me:PASSWORD\n")
        return False

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="notes"')
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    ThreadingHTTPServer(("", port), Notes).serve_forever()
