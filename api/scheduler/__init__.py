"""The scheduler: which requests run in which step, decided by a state machine with no clock, no I/O, no sockets."""
