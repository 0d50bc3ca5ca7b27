"""What every test gets: no network look-ups, one torch thread, and no telemetry."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Before torch is imported: two cores are shared by the test process and the processes it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
