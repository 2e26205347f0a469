"""gpu.py as far as it goes without one: the thread that makes batches."""

import threading
import time

import pytest
import torch

from trivox.gpu import ahead, in_thread


def test_batches_come_in_order_and_no_more_than_asked_for_are_made():
    made = []

    def batches():
        for n in range(100):
            made.append(n)
            yield n

    source, seen = in_thread(batches(), 2), []
    for _ in range(5):
        seen.append(next(source))
        time.sleep(0.02)
        assert len(made) <= len(seen) + 3  # two wait, one is in hand
    assert seen == [0, 1, 2, 3, 4]
    source.close()
    assert threading.active_count() == 1 or not any("work" in thread.name for thread in threading.enumerate())


def test_an_error_comes_in_its_turn_and_the_thread_ends():
    def batches():
        yield 1
        yield 2
        raise ValueError("a clip is gone")

    source = in_thread(batches(), 2)
    assert [next(source), next(source)] == [1, 2]
    with pytest.raises(ValueError, match="a clip is gone"):
        next(source)
    assert not any("work" in thread.name for thread in threading.enumerate())
    assert list(in_thread(iter(range(7)), 3)) == list(range(7))


def test_a_cpu_needs_no_thread():
    threads = threading.active_count()
    source = ahead(iter([({"x": torch.ones(2)}, 3)]), torch.device("cpu"))
    assert next(source)[1] == 3 and threading.active_count() == threads
