"""What `make up` takes the snapshot `python3` of: Python, with what programs import first in memory."""

import asyncio  # noqa: F401
import json  # noqa: F401
import os
import sqlite3  # noqa: F401
import ssl  # noqa: F401
import sys
import uuid  # noqa: F401
from http.server import BaseHTTPRequestHandler, HTTPServer

sys.path.append("/run/spore/lib")
try:
    # Each fork is to draw random numbers of its own.
    import spore_after_fork  # noqa: F401
except ImportError:
    print("this VM tells nobody of its forks", flush=True)

HTTPServer(("0.0.0.0", int(os.environ["PORT"])), BaseHTTPRequestHandler).serve_forever()
