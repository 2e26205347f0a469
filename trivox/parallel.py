"""Work shared by all cores of a machine."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context, parent_process
from threading import Thread, current_thread, main_thread

import torch

from trivox.common import UserError


def cores():
    """The processor cores that are for this process, one of those that torchrun started here."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def parallel(threads=False):
    """A pool of a process a core, or a thread: `map` in it. The processes start anew, since the fork of one that runs
    torch's threads can hang. Of threads each has one of BLAS's, which would otherwise take all cores for each of them.
    Raises UserError where a process is killed."""
    from threadpoolctl import threadpool_limits

    blas = threadpool_limits(1, "blas") if threads and current_thread() is main_thread() else nullcontext()
    pool = ThreadPoolExecutor(cores()) if threads else ProcessPoolExecutor(cores(), get_context("spawn"), _begin)
    try:
        if not threads:
            with no_interrupts():  # Ctrl-C is for this process; those that work for it end with it
                pool.submit(int)
        with blas:
            yield pool
    except KeyboardInterrupt:
        if not threads:
            for process in [*pool._processes.values()]:  # else what they are at would be waited for
                process.kill()
        raise
    except BrokenProcessPool:
        raise UserError("a process of those that share this work was killed, perhaps because the memory ran out; the "
                        "same command goes on where it stopped") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def no_interrupts():
    """Processes that are started meanwhile do not see Ctrl-C."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin():
    """One thread for torch; and an end with the process that is worked for, were it only killed."""
    torch.set_num_threads(1)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
