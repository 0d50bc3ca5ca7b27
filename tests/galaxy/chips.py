"""Whether these tests run on real chips: GALAXYLINE_CHIPS=1 says so, and then nothing is a mock."""

import os

ON_CHIPS = os.environ.get("GALAXYLINE_CHIPS") == "1"
