"""One thread a process, for the tests run on several processes; no network, and nothing remembered."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PEFTSURGERY_CACHE", "")
