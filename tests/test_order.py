"""order.py: each clip once an epoch, whatever a run goes on with."""

import json
import os
import random
from collections import Counter
from itertools import islice

import pytest
import torch
from conftest import finish, launch
from helpers import free_port

import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import common
from trivox.finite import Watch
from trivox.order import POOL, steps
from trivox.run_folder import newest

TRAINERS = {"flow": train_flow_tts, "codec": train_codec_lm, "llm": train_llm_tts}


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
    others = [*range(3, 43)]
    assert {clip for _, clip in taken(steps(0, others, lengths, 5, place), 8 * POOL)} == {*others}
    assert "40 clips, and they are other ones" in capsys.readouterr().out
    pairs = taken(steps(0, list(range(30)), lengths, 5, place), 6)
    assert {epoch for epoch, _ in pairs} <= {2, 3, 4, 5} and sorted(clip for _, clip in pairs)[-1] < 30
    assert "30 clips, and there were 40" in capsys.readouterr().out

# ------------------------------------------------------------------------------------------------------------
# In the trainers

def train_noting(path, system, argv, rank, world, port):
    """A trainer as one of several processes. The first writes what each step was drawn, a line of JSON for each clip.
    """
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    see = Watch.see

    def noted(self, step, drawn, *more):
        if rank == 0:
            with path.open("a") as f:
                f.writelines(json.dumps(one) + "\n" for one in drawn)
        return see(self, step, drawn, *more)

    Watch.see = noted
    common.run(TRAINERS[system].main, argv)


@pytest.mark.long
@pytest.mark.parametrize("system", TRAINERS)
def test_trainers_stopped_and_resumed_with_any_batch_and_processes(system, tiny_run, tmp_path):
    """1 process with 4 clips, 3 with 2, 2 with 8, 1 with 2: each clip, with those that wait in the pool, as often as
    any other, but for the epoch that has begun, and never with the noise it had before."""
    path, steps = tmp_path / "drawn", 0
    for world, batch, more in (1, 4, 5), (3, 2, 6), (2, 8, 3), (1, 2, 11):
        steps += more
        argv = [f"--{key}={value}" for key, value in tiny_run(system).items()] + [
            "--resume", f"--out_dir={tmp_path / 'run'}", f"--steps={steps}", f"--batch_size={batch}"]
        port = free_port()
        for process in [launch(train_noting, path, system, argv, rank, world, port) for rank in range(world)]:
            status, said = finish(process)
            assert status == 0, said
    drawn = [json.loads(line) for line in path.read_text().splitlines()]
    place = torch.load(newest(tmp_path / "run") / "state.pt", weights_only=True)["place"]
    if system == "llm":  # which draws nothing about a clip
        took, waits = [clip for (clip,), step in drawn], [clip for row in place["rows"] for clip in row]
    else:
        took, waits = [one["clip"] for one in drawn], [clip for _, clip in place["rows"]]
        assert len({*map(str, drawn)}) == len(drawn)
    assert len(took) == 5 * 4 + 6 * 6 + 3 * 16 + 11 * 2 and len(took) + len(waits) == place["taken"]
    times = Counter(took + waits)
    assert len(times) == place["of"] and {*times.values()} <= {n := place["taken"] // place["of"], n + 1}
