"""The one place that touches sys.path. A script in extras/ imports this first: then it finds the
six files, the other extras, and what the tests support it with."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]
