"""The Ray cluster: its hosts and rows, the placement of stages, and how processes are ended."""
