"""Makes the random numbers of this process its own again when its VM was forked.

Imported once, early: `import spore_after_fork` with /run/spore/lib on the path. A thread of its own
waits for the agent's word. Outside of a VM of Spore it does nothing.
"""

import gc
import json
import os
import random
import socket
import sys
import threading

SOCKET = "/run/spore/agent.sock"

_hooks = []


def register(hook):
    """Has `hook(incarnation)` called in each fork, before its network opens. Usable as decorator."""
    _hooks.append(hook)
    return hook


def _renew():
    for found in gc.get_objects():
        if isinstance(found, random.Random) and not isinstance(found, random.SystemRandom):
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


def _listen(agent):
    with agent, agent.makefile("rb") as lines:
        for line in lines:
            forked = json.loads(line).get("forked")
            if forked is None:
                continue
            _renew()
            for hook in _hooks:
                hook(forked)
            agent.sendall(b'{"done":true}\n')


def _start():
    agent = socket.socket(socket.AF_UNIX)
    try:
        agent.connect(SOCKET)
        agent.sendall(b'{"ask":"after_fork"}\n')
    except OSError:
        agent.close()
        return
    threading.Thread(target=_listen, args=(agent,), name="spore-after-fork", daemon=True).start()


_start()
