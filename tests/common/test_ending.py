"""The end of the interpreter waits for visits from threads of other libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import threading, time
from tilefold.common.ending import visit

begun = threading.Event()

def stay():
    with visit():
        begun.set()
        time.sleep(0.2)
        print("left", flush=True)
    time.sleep(60)

threading.Thread(target=stay, daemon=True).start()
begun.wait()
"""

LATE = """
from tilefold.common import ending

def late():
    try:
        with ending.visit():
            print("inside")
    except RuntimeError as error:
        print(error)

ending._visits.close()
late()
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [(SCRIPT, "left"), (LATE, "the program ends, so no call is prepared any more")],
    ids=["a visit that began", "a visit that comes late"],
)
def test_the_end_waits_for_visits_and_lets_no_more_begin(script: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout.strip(), done.returncode) == (said, 0), done.stderr
