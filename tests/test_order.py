"""order.py: each clip once an epoch, whatever a run goes on with."""

import random
from collections import Counter
from itertools import islice

import pytest

from trivox.order import POOL, steps


def lengths(clips):
    return [clip * 7919 % 500 for clip in clips]


def taken(walk, count):
    return [pair for rows, _ in islice(walk, count) for pair in rows]


@pytest.mark.parametrize("clips, count", [(37, 1), (37, 5), (64, 8), (3, 10), (400, 2)])
def test_an_epoch_has_each_clip_once(clips, count):
    """Also where a step holds more clips than there are. Only a pool that two epochs share may mix them."""
    some = list(range(100, 100 + clips))
    whole = -(-clips // count) * POOL * 4
    pairs = taken(steps(0, some, lengths, count), whole)
    assert len(set(pairs)) == len(pairs) == whole * count
    epochs = Counter(epoch for epoch, _ in pairs)
    for epoch in range(max(epochs) - 1 - POOL * count // clips):
        assert sorted(clip for e, clip in pairs if e == epoch) == some
    orders = [[clip for e, clip in pairs if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1] or clips < POOL * count  # within a pool they are sorted


def test_clips_of_a_step_are_of_like_length():
    """Within a pool of steps no clip of one is longer than any of the next; the steps themselves are in no order."""
    spans = []
    for rows, _ in islice(steps(0, list(range(300)), lengths, 8), POOL):
        own = lengths([clip for _, clip in rows])
        spans.append((min(own), max(own)))
    for (_, longest), (shortest, _) in zip(sorted(spans), sorted(spans)[1:]):
        assert longest <= shortest
    assert spans != sorted(spans)


@pytest.mark.parametrize("seed", range(6))
def test_stopped_anywhere_and_resumed_with_any_batch(seed):
    """Half the clips a step, twice, three times as many: each clip still comes once an epoch."""
    rng, clips, count, place, pairs = random.Random(seed), list(range(50)), 8, None, []
    for _ in range(12):
        for rows, place in islice(steps(seed, clips, lengths, count, place), rng.randrange(1, 30)):
            assert len(rows) == count
            pairs += rows
        count = rng.choice([1, 4, 8, 16, 24])
    assert len(set(pairs)) == len(pairs)
    left = {(epoch, clip) for epoch in range(place["taken"] // 50 + 1) for clip in clips} - set(pairs)
    waiting = set(map(tuple, place["rows"]))
    assert waiting <= left and {epoch for epoch, _ in left - waiting} <= {place["taken"] // 50}


def test_a_walk_is_taken_up_where_it_was_left():
    whole = [*islice(steps(3, list(range(40)), lengths, 6), 100)]
    assert [*islice(steps(3, list(range(40)), lengths, 6, whole[41][1]), 20)] == whole[42:62]
    assert [*islice(steps(3, list(range(40)), lengths, 6, None, done=30), 20)] == whole[30:50]


def test_other_clips_begin_a_new_epoch(capsys):
    *_, (_, place) = islice(steps(0, list(range(40)), lengths, 4), 3)
    pairs = taken(steps(0, list(range(30)), lengths, 5, place), 6)
    assert {epoch for epoch, _ in pairs} <= {2, 3, 4, 5} and sorted(clip for _, clip in pairs)[-1] < 30
    assert "30 clips, and there were 40" in capsys.readouterr().out
