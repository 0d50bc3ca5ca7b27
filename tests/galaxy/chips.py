"""Whether these tests run on real chips: with GALAXYLINE_CHIPS=1 nothing is a mock."""

import os

ON_CHIPS = os.environ.get("GALAXYLINE_CHIPS") == "1"
