"""The one place that touches sys.path. A script in extras/ imports this first. After that it can
import the six files, the other scripts (from extras import report), and the tests' support
(from support.memory import LiveBytes)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]
