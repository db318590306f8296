"""Run by every Python process whose PYTHONPATH begins here: it is to hear of its VM's forks."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import spore_after_fork


def _run_the_next():
    """Runs the file of this name that the interpreter would have found."""
    here = os.path.dirname(__file__)
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if path != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_run_the_next()
