"""What commands have in common: signals, progress."""

import subprocess
import sys

SWALLOWED = """
import os, signal
from pipeline import console

signal.signal(signal.SIGTERM, console._terminate)

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10_000):
            pass

with console.progress_bar("Working", "images") as advance:
    Finalized()
    print("still here", flush=True)
    advance(1, 2)
print("too far")
"""


def test_a_sigterm_that_a_finalizer_swallows_ends_the_next_progress() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "still here\n")
    assert "Exception ignored" in done.stderr
