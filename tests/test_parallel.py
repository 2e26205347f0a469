"""parallel.py: workers that are killed, and workers whose master is."""

import os
import signal
import time
from pathlib import Path

from conftest import finish, launch, refusal
from threadpoolctl import threadpool_info, threadpool_limits

from trivox import common, parallel

def _die_at_three(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _sleep(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def _share(function, jobs):
    with parallel.parallel() as pool:
        list(pool.map(function, jobs))


def _at_a_terminal(folder):
    os.setsid()
    common.run(lambda argv: _share(_sleep, [folder] * parallel.cores()), [])


def test_an_interrupt(tmp_path):
    """Ctrl-C reaches all processes at a terminal. It ends them at once, without a traceback."""
    process = launch(_at_a_terminal, tmp_path)
    wait = time.monotonic() + 60
    while len(workers := list(tmp_path.iterdir())) < parallel.cores():
        assert process.is_alive() and time.monotonic() < wait
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == (130, "")
    assert not any(Path("/proc", worker.name).exists() for worker in workers)


def test_a_worker_that_is_killed():
    """Then nothing waits for it for ever."""
    assert "was killed" in refusal(lambda argv: _share(_die_at_three, range(8)))


def test_workers_end_with_whom_they_work_for(tmp_path):
    process = launch(_share, _sleep, [tmp_path] * parallel.cores())
    wait = time.monotonic() + 60
    while len(workers := list(tmp_path.iterdir())) < parallel.cores():
        assert process.is_alive() and time.monotonic() < wait
        time.sleep(0.05)
    process.kill()
    lines = [Path("/proc", worker.name, "cmdline") for worker in workers]
    while any(line.exists() and line.read_bytes() for line in lines):  # a zombie's is empty
        assert time.monotonic() < wait + 30
        time.sleep(0.05)


def test_threads_of_blas():
    """Each thread of a pool has one, and afterwards they are as before."""
    def counts(*_):
        return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}

    with threadpool_limits(2, "blas"):
        with parallel.parallel(threads=True) as pool:
            assert [*pool.map(counts, range(2))] == [{1}, {1}]
        assert counts() == {2}
