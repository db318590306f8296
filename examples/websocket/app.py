"""Echoes WebSocket messages (RFC 6455) with the standard library alone; GET / is a page to try."""

import base64
import hashlib
import os
import socketserver
import struct

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MESSAGE_BYTES_MAX = 1 << 20
PAGE = b"""<!doctype html><title>echo</title><input id=i placeholder="type, then Enter"><pre id=o></pre>
<script>
const s = new WebSocket("ws://" + location.host + "/");
s.onmessage = e => o.textContent += e.data + "\\n";
i.onchange = () => { s.send(i.value); i.value = "" };
</script>"""


class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        request = self.rfile.readline(8192).decode("latin-1").split()
        headers = {}
        while (line := self.rfile.readline(8192).decode("latin-1").strip()):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if len(request) < 3:
            return
        key = headers.get("sec-websocket-key")
        if headers.get("upgrade", "").lower() != "websocket" or key is None:
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(PAGE)}\r\n"
            self.wfile.write(head.encode() + b"Connection: close\r\n\r\n" + PAGE)
            return
        accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
        self.wfile.write(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        self.echo()

    def echo(self):
        message, kind = b"", 0
        while True:
            first, second = self.exactly(2)
            opcode, length = first & 15, second & 127
            if length == 126:
                (length,) = struct.unpack("!H", self.exactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", self.exactly(8))
            if not second & 128 or len(message) + length > MESSAGE_BYTES_MAX:
                return
            mask = self.exactly(4)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(self.exactly(length)))
            if opcode == 8:
                self.send(8, data[:2])
                return
            if opcode == 9:
                self.send(10, data)
            elif opcode in (0, 1, 2):
                message, kind = message + data, opcode or kind
                if first & 128:
                    self.send(kind, message)
                    message = b""

    def exactly(self, count):
        data = self.rfile.read(count)
        if len(data) < count:
            raise ConnectionResetError
        return data

    def send(self, opcode, data):
        if len(data) < 126:
            head = struct.pack("!BB", 128 | opcode, len(data))
        elif len(data) < 1 << 16:
            head = struct.pack("!BBH", 128 | opcode, 126, len(data))
        else:
            head = struct.pack("!BBQ", 128 | opcode, 127, len(data))
        self.wfile.write(head + data)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request, client_address):
        print(f"{client_address[0]} left", flush=True)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"listening on {port}", flush=True)
    Server(("", port), Echo).serve_forever()
