"""Which requests run in which step: a state machine with no clock, no I/O and no sockets."""
