"""Whether the tests marked ``soak`` run in their long form, as in `make soak`."""

from __future__ import annotations

import os

SOAK = "PIDPOOL_SOAK" in os.environ
