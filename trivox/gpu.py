"""Keeping a GPU busy: batches made ahead in a thread, steps replayed as CUDA graphs. Elsewhere nothing is done."""

import queue
import threading
from collections import Counter
from functools import cache

import torch


def send(batch, device):
    """A dict of tensors, on the device; a GPU goes on with what it does, but for Apple's."""
    if device.type != "cuda":
        return {name: x.to(device) for name, x in batch.items()}
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


def ahead(batches, device, count=2):
    """The same tuples, each of which begins with a dict of tensors, made and sent in a thread: `count` wait for a GPU,
    copied on a stream of their own. What the thread raises is raised here."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def made():
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for one in batches:
                yield one, stream.record_event()

    for one, event in in_thread(made(), count):
        event.wait()
        for x in one[0].values():
            x.record_stream(torch.cuda.current_stream())
        yield one


def in_thread(items, count):
    """The items of an iterator, which runs in a thread, so many ahead. What it raises is raised here, in its turn."""
    waiting, stop = queue.Queue(count), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()


GRAPHS = 32  # at most, as each takes some memory


def graphs(device):
    """Whether steps of sampling are captured in CUDA graphs there."""
    return device.type == "cuda"


def replayed(step, device, world):
    """On one GPU: `step`, a function of a dict of tensors that adds to gradients and returns a tensor, as CUDA graphs,
    one for each set of shapes from its third time on. To launch a small model's kernels one by one takes longer than
    they do. Gradients must stay where they are (set_to_none=False). Elsewhere: `step` as it is."""
    if device.type != "cuda" or world > 1:
        return step
    graphs, seen, pool = {}, Counter(), torch.cuda.graph_pool_handle()

    def run(batch):
        shapes = tuple((name, x.shape) for name, x in batch.items())
        if shapes not in graphs:  # what is compiled, and gradients that are not there yet, must not be captured
            seen[shapes] += 1
            if seen[shapes] < 3 or len(graphs) == GRAPHS:
                return step(batch)
            fixed, graph = {name: x.clone() for name, x in batch.items()}, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = step(fixed)
            graphs[shapes] = fixed, graph, result
        fixed, graph, result = graphs[shapes]
        for name, x in batch.items():
            fixed[name].copy_(x)
        graph.replay()
        return result

    return run


def capture(step, state, pool=None):
    """Capture a function that works in place on tensors in a CUDA graph, and return its replay. state: all the tensors
    that it changes; afterwards they are as they were. pool: memory that graphs share of which none needs what another
    left there. It is not compiled: that takes longer than speaking a page."""
    before = [x.clone() for x in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # finds algorithms and memory, which may not be while it is captured
    torch.cuda.current_stream().wait_stream(stream)
    torch.clear_autocast_cache()  # casts of weights that it keeps would be gone before the graph is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # `ahead` may be at work in its thread
        step()
    torch.clear_autocast_cache()
    for x, old in zip(state, before):
        x.copy_(old)

    def replay(read=step):  # what the step reads must stay in memory as long as the graph
        graph.replay()

    return replay


KEPT, MOST_KEPT = {}, 16  # what `repeat` has captured, the newest last


@cache
def shared_pool():
    return torch.cuda.graph_pool_handle()


def repeat(make, changed, read, count, key):
    """Take a step `count` times as a CUDA graph, which is kept for the next call with this key and with tensors of
    these shapes and types; of many, the oldest is dropped. make(*changed, *read) returns the step, which works in place
    on the tensors `changed` and only reads `read`; key: all else that it depends on. Threads never share a graph."""
    tensors = *changed, *read
    key = *key, *((x.shape, x.dtype, x.device) for x in tensors)
    fixed, step = KEPT.pop(key, (None, None))
    if step is None:
        fixed = [x.clone() for x in tensors]
        step = capture(make(*fixed), fixed[:len(changed)], shared_pool())
    for x, new in zip(fixed, tensors):
        x.copy_(new)
    for _ in range(count):
        step()
    for x, new in zip(changed, fixed):
        x.copy_(new)
    KEPT[key] = fixed, step
    while len(KEPT) > MOST_KEPT:
        KEPT.pop(next(iter(KEPT)))
