"""The Ray cluster: hosts, rows, placement, the ends of processes."""
