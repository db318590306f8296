"""Makes the random numbers of this process its own again when its VM was forked.

Imported once, early: `import spore_after_fork` with /run/spore/lib on the path. A thread of its own
waits for the agent's word. Outside of a VM of Spore it does nothing.
"""

import gc
import json
import os
import socket
import sys
import threading

SOCKET = "/run/spore/agent.sock"

_hooks = []
_agent = None


def register(hook):
    """Has `hook(incarnation)` called in each fork, before its network opens. Usable as decorator."""
    _hooks.append(hook)
    return hook


@register
def _renew(_forked):
    # What was not imported drew nothing.
    random = sys.modules.get("random")
    if random is not None:
        for found in gc.get_objects():
            kind = type(found)
            if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
                found.seed()
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(os.urandom(32), 32.0)
    uuid = sys.modules.get("uuid")
    if uuid is not None:
        uuid._last_timestamp = None
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _run(forked):
    """Whether every hook did its work; each is given the chance."""
    is_done = True
    for hook in _hooks:
        try:
            hook(forked)
        except Exception:
            sys.excepthook(*sys.exc_info())
            is_done = False
    return is_done


def _listen(agent):
    heard = b""
    while True:
        line, end, rest = heard.partition(b"\n")
        if not end:
            more = agent.recv(4096)
            if not more:
                return
            heard += more
            continue
        heard = rest
        told = json.loads(line)
        if "error" in told:
            print("spore: this process hears of no fork:", told["error"], file=sys.stderr)
        forked = told.get("forked")
        if forked is not None and _run(forked):
            agent.sendall(b'{"done":true}\n')


def _start():
    global _agent
    if _agent is not None:
        # A child process would keep its parent's place.
        _agent.close()
        _agent = None
    agent = socket.socket(socket.AF_UNIX)
    try:
        agent.connect(SOCKET)
        agent.sendall(b'{"ask":"after_fork"}\n')
    except OSError:
        agent.close()
        return
    _agent = agent
    threading.Thread(target=_listen, args=(agent,), name="spore-after-fork", daemon=True).start()


_start()
os.register_at_fork(after_in_child=_start)
