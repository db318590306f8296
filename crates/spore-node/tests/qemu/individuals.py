# Says a line of what must be its VM's own to whoever connects, and then what it knows to share.
import _random
import os
import random
import socket
import ssl
import sys
import uuid

sys.path.append("/run/spore/lib")
import spore_after_fork

seeded = random.Random(os.urandom(16))
shared = _random.Random(7)
forks = []
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@spore_after_fork.register
def remember(name):
    forks.append(name)


def hello():
    """The random number and the session that a handshake begins with."""
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(ours, theirs, server_hostname="notes.test").do_handshake()
    except ssl.SSLWantReadError:
        pass
    record = theirs.read()
    return [record[11:43].hex(), record[44:76].hex()]


def text(path):
    with open(path) as file:
        return file.read().strip()


def own():
    drawn = [random.random(), random.getrandbits(64), seeded.random()]
    told = [uuid.uuid4(), uuid.uuid1(), text("/etc/machine-id")]
    bytes = [os.urandom(16).hex(), ssl.RAND_bytes(16).hex(), *hello()]
    return [*drawn, *told, text("/proc/sys/kernel/random/boot_id"), *bytes]


own()
if "ONE_THAT_NEVER_ANSWERS" in os.environ:
    mute = socket.socket(socket.AF_UNIX)
    mute.connect("/run/spore/agent.sock")
    mute.sendall(b'{"ask":"after_fork"}\n')
server = socket.create_server(("0.0.0.0", int(os.environ["PORT"])))
while True:
    asks, _ = server.accept()
    with asks:
        words = [*own(), "|", shared.random(), *forks]
        asks.sendall(" ".join(map(str, words)).encode())
