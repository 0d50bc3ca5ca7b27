"""How a child is kept from the Ctrl-C that a terminal sends to the whole process group of its command."""

import os

leave_group = os.setpgrp
"""For subprocess's `preexec_fn`: the child becomes a process group of its own (uvloop has no other way to say so).

It does not become a session: Linux shares the cores out among sessions first (sched(7), autogroups), and on a busy core
one that has slept may then wait for seconds although it could run, as a front end did that was in another session than
its stages.
"""
