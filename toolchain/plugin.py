"""What every plugin process of the engine does: serve on a free port, print it, and end with the engine."""

import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

MESSAGE_LIMIT = 400 << 20  # bytes, the engine's own limit for one message


def serve(add: Callable[[grpc.Server], None], stop: threading.Event) -> None:
    """Serve what ``add`` registers until ``stop`` is set, by a signal, or because the engine is gone.

    The engine starts plugins in process groups of their own, so Ctrl-C does not reach them: a SIGINT is the engine's word.
    """
    # Not from the handler itself: it runs within the main thread's wait(), which may hold the lock that set() takes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    options = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.max_send_message_length", MESSAGE_LIMIT)]
    server = grpc.server(ThreadPoolExecutor(max_workers=32), options=options)
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)

    def end_with_engine() -> None:
        select.select([os.pidfd_open(os.getppid())], [], [])  # an engine that was killed cannot cancel its plugins
        stop.set()

    threading.Thread(target=end_with_engine, daemon=True).start()
    stop.wait()
    server.stop(grace=1).wait(2)
    os._exit(0)  # a program that waits for a resource that failed would hold the interpreter
