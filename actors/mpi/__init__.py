"""The MPI world that ttnn's sockets between processes need, with Ray as the only launcher."""
