"""Ray's thread that prints what its daemons complain of. The module imports Ray; see `cluster`."""

from ray._private.worker import global_worker


def stop_error_listener() -> None:
    """Ends the thread in which a driver waits for error messages of the cluster, to print them.

    Without Ray's head it asks in a loop that never waits, and takes a core, and the interpreter, from what still
    serves. What it prints is of no use here: the pipeline finds out by itself what became of its stages. Ray has no
    setting for it; its own `disconnect` ends it in the same way, and may do so again.
    """
    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()  # type: ignore[attr-defined] # set as it connects
    global_worker.listener_thread.join()  # type: ignore[attr-defined]
