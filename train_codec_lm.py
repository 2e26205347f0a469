"""Train the codec language model: the parallel code streams of a neural audio codec, one delayed step at a time.

    python train_codec_lm.py --config configs/codec_demo.yaml
    torchrun --nproc-per-node 2 train_codec_lm.py --config configs/codec_ljspeech.yaml --batch_size 12

All that makes up the experiment stands below, in the order in which it happens. Edit it and run it again.

What a step draws at random (where a long clip is cut, dropped text) comes from (seed, epoch, clip), and which clips it
takes from the seed and from how many clips were taken before. So a result does not depend on how many processes share
the work, and a run that was killed goes on as if it had not been. Dropout alone depends on the number of processes:
its masks come from (seed, step, rank).
"""

import math
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trivox import common, finite, run_folder  # first: from here on Ctrl-C is quiet

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from model import CodecConfig, CodecLM, delayed_batch
from trivox.audio import log_mel
from trivox.checkpoints import check_codec
from trivox.codecs import load_codec
from trivox.common import Folder, Fraction, Limit, NotNegative, Positive, Share, Top, UserError, all_sum, autocast
from trivox.cross_entropy import linear_cross_entropy
from trivox.datasets import TokenDataset, keep_codec, open_tokens
from trivox.gpu import ahead, replayed, send
from trivox.metrics import perplexity, score_clips
from trivox.muon import Muon
from trivox.options import read_options
from trivox.order import steps
from trivox.pages import write_page
from trivox.recognisers import load_recognisers
from trivox.samples import write_references, write_samples
from trivox.speak import Clip, CodecSpeaker, decode
from trivox.text import TextFeatures, read_lines


@dataclass
class Config(common.RunConfig, CodecConfig):
    # data
    data_dir: Folder = "data/demo_tokens"
    overfit: NonNegativeInt = 0  # train on the first N clips alone, and validate on the same
    # text, where cross_every asks for it
    text_condition_dropout: Share = 0.1  # how often the text is empty, for classifier-free guidance
    duration_loss_weight: NotNegative = 0.1
    # optimisation
    batch_size: PositiveInt = 24  # clips per process and micro-step
    grad_accum_steps: PositiveInt = 1
    steps: PositiveInt = 1000
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: for the matrices of the blocks, with adamw for all else
    lr: NotNegative = 1e-3
    min_lr: NotNegative = 1e-4
    warmup_steps: NonNegativeInt = 50
    weight_decay: NotNegative = 0.1  # of the matrices of the blocks
    grad_clip: Limit = 1.0
    ema_decay: Fraction = 0.999
    init_from: str = ""  # start from the weights of this checkpoint, with a fresh optimizer
    # evaluation
    eval_every: PositiveInt = 500  # steps; the validation loss chooses the checkpoint `best`
    sample_every: NonNegativeInt = 1000  # steps; 0 for never. Seeds and prompts stay the same, to hear the progress
    eval_samples: PositiveInt = 4  # made from nothing, and as many that continue held-out clips; with text, sentences
    eval_prompts: str = "heldout"  # with text: heldout, overfit (clips trained on), or a file with a sentence a line
    eval_seconds: Positive = 8.0  # of a sample, with its prompt; with text, at most
    eval_prompt_seconds: NotNegative = 3.0  # of the held-out clip that is continued
    eval_temperature: NotNegative = 1.0
    eval_top_k: NonNegativeInt | list[NonNegativeInt] = 0  # most probable codes to choose from, 0: all; or one a book
    eval_top_p: Top | list[Top] = 1.0  # choose among those that together have this probability; likewise
    eval_cfg_scale: NotNegative = 1.0  # guidance by the text, 1 for none
    eval_embedding: Literal["auto", "clap", "logmel"] = "auto"  # of the Fréchet distance
    eval_recogniser: Literal["auto", "whisper", "tiny", "grammar", "sentences", "open"] = "auto"
    # run: the rest is common.RunConfig
    out_dir: Folder = "runs/codec"


# ------------------------------------------------------------------------------------------------------------
# Batches

def draw(c, epoch, clip):
    """What is random about a clip in an epoch, as a dict: clip, cut (from which share of its surplus on), drop."""
    rng = np.random.default_rng([c.seed, 0, epoch, clip])
    return {"clip": clip, "cut": rng.random(), "drop": rng.random() < c.text_condition_dropout}


def make_batch(c, data, features, draws, device):
    """The tensors of a micro-batch, on the device: what is longer than the context is cut, and with text, where clips
    are whole sentences, EOS ends them. Lengths are padded to multiples of 16: so there are fewer shapes."""
    room, clips = c.context - c.codebooks, []
    for d in draws:
        codes = data.codes(d["clip"])
        start = int(d["cut"] * (max(0, len(codes) - room) + 1))
        clips.append(codes[start:start + room])
    batch = {"tokens": delayed_batch(c, clips, multiple=16), "frames": torch.tensor([len(codes) for codes in clips])}
    if c.cross_every:
        text, length = features(["" if d["drop"] else data.rows[d["clip"]]["text"] for d in draws], multiple=16)
        batch |= {"text": text, "length": length, "drop": torch.tensor([d["drop"] for d in draws])}
    return send(batch, device)


def counts(c, data, draws):
    """How many frames the clips of these draws have, how many of the clips have text, and how many end in EOS."""
    room = c.context - c.codebooks
    frames = sum(min(int(data.frames[d["clip"]]), room) for d in draws)
    return frames, max(1, sum(not d["drop"] for d in draws)), len(draws) * bool(c.cross_every)


# ------------------------------------------------------------------------------------------------------------
# Loss

def codec_loss(c, model, batch):
    """Of a micro-batch, each a sum: the cross-entropies of its real codes, to which the first book counts EOS, which
    alone has gradients; those of each book, (Q,); how many had the highest logit, (Q,); the squared errors of log
    seconds of the clips with text."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    target_is_real = (targets < c.codebook_size) | (targets == c.codebook_size + 2)
    seconds = batch["frames"] / c.frame_rate
    x, log_seconds = model(inputs, batch.get("text"), batch.get("length"), seconds)  # (B, S, D)
    targets = targets.masked_fill(~target_is_real, -100).flatten(0, 1)
    entropy, of_books, hits = linear_cross_entropy(x.flatten(0, 1), common.unwrapped(model).heads.weight, targets)
    duration = entropy.new_zeros(())
    if log_seconds is not None:
        duration = ((log_seconds - seconds.log()).square() * ~batch["drop"]).sum()
    return entropy, of_books, hits, duration


# ------------------------------------------------------------------------------------------------------------
# Evaluation

def by_book(name, values):
    """The mean over books of something and its value for each, as the log has them."""
    return {name: float(np.mean(values)), **{f"{name}_book{q}": float(v) for q, v in enumerate(values)}}


def validate(c, model, data, features, clips, rank, world, device, dtype):
    """Cross-entropy and accuracy of each book over all validation clips with their texts, and the duration loss."""
    clips = sorted(clips, key=lambda clip: data.frames[clip])
    frames = counts(c, data, [{"clip": clip, "drop": False} for clip in clips])[0]
    sums = torch.zeros(2 * c.codebooks + 1, dtype=common.widest(device), device=device)
    for i in range(rank * c.batch_size, len(clips), world * c.batch_size):
        sums += score_clips(model, data, features, clips[i:i + c.batch_size], device, dtype)
    sums = np.array(all_sum(sums.tolist(), device))
    loss, accuracy = (by_book(f"val_{name}", sums[at:at + c.codebooks] / frames)
                      for name, at in (("loss", 0), ("accuracy", c.codebooks)))
    return loss | accuracy | {"val_perplexity": perplexity(loss["val_loss"]),
                              "val_duration_loss": sums[-1] / len(clips)}


def make_prompts(c, data, val, speaker):
    """The prompts of each sampling, see trivox/samples.py: some clips from nothing, and as many that go on from the
    first seconds of held-out ones; with text, sentences."""
    n, prompts, clips = c.eval_samples, [], []
    if c.cross_every:
        clips = {"heldout": val, "overfit": data.clips("all")}.get(c.eval_prompts, [])
        clips = [i for i in clips if speaker.sayable(data.rows[i]["text"])][:n]
        texts = [data.rows[i]["text"] for i in clips] or read_lines(c.eval_prompts)[:n]
        prompts = [{"request": {"text": text, "seed": seed}, "label": text} for seed, text in enumerate(texts)]
    else:
        prompts = [{"request": {"seed": seed}, "label": f"from nothing, seed {seed}"} for seed in range(n)]
        if start := round(c.eval_prompt_seconds * c.frame_rate):
            seconds, clips = max(c.eval_seconds - c.eval_prompt_seconds, 1 / c.frame_rate), [None] * n + val[:n]
            prompts += [{"request": {"seed": n + i, "prompt": data.codes(clip)[:start], "seconds": seconds},
                         "label": f"{data.rows[clip]['id']}, continued after {c.eval_prompt_seconds:g} s"}
                        for i, clip in enumerate(val[:n])]
    for prompt, clip in zip(prompts, clips + [None] * len(prompts)):
        prompt["reference"] = None
        if clip is not None:
            wav = decode(speaker.codec, data.codes(clip))
            prompt["reference"] = Clip(wav, log_mel(wav, speaker.mel))
    return prompts


# ------------------------------------------------------------------------------------------------------------
# The run

def main(argv):
    c = common.load_config(Config, argv)
    read_options("codec", asdict(c), {})  # refuses a wrong eval_* now, not at the first sample
    stop, rank, world, device, dtype = common.begin(c)
    say = print if rank == 0 else lambda text: None

    # Data
    data = open_tokens(TokenDataset, c.data_dir, c, c.language)
    features = TextFeatures("bytes", phonemes=c.phonemes)
    if c.phonemes:
        features.check(c.data_dir, [row["text"] for row in data.rows])
        if rank == 0:
            features.tell_language(c.language)
    train, val = data.clips("train"), data.clips("val")
    if c.overfit:
        train = val = data.clips("all")[:c.overfit]
    if c.cross_every and (longest := data.frames.max()) > c.context - c.codebooks - 1:
        raise UserError(f"a clip of {longest} frames and its end do not fit into a context of {c.context} delayed "
                        "steps, and a text needs its whole clip: raise --context")

    # Model
    model = CodecLM(c).to(device)
    model.checkpointing = c.activation_checkpointing
    ema = deepcopy(model)  # a moving average of the weights; it is what is evaluated and what is heard

    # Optimizer: Muon (Jordan et al., 2024) for the matrices of the blocks
    blocks = [*model.blocks, *(model.encode_text.blocks if c.cross_every else [])]
    matrices = [m.weight for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adamw = dict(lr=c.lr, betas=(0.9, 0.95), fused=True)
    if c.optimizer == "muon":
        optimizers = [Muon(matrices, c.lr, c.weight_decay),
                      torch.optim.AdamW(others, weight_decay=0, **adamw)]
    else:
        optimizers = [torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                         {"params": others, "weight_decay": 0}], **adamw)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run stands
    step, best, place, state = 0, float("inf"), None, None
    sums = torch.zeros(2 * c.codebooks + 3, device=device)  # since the last line of the log, over its finite steps
    checkpoint = run_folder.open_run(c)
    if checkpoint:
        state = run_folder.load_run(checkpoint, c, {"model": model, "ema": ema}, optimizers, scaler)
        check_codec(c.data_dir, checkpoint)
        step, best, place = state["step"], state["best"], state["place"]
        if len(state["sums"]) == len(sums) and rank == 0:  # the total of all processes; older runs had other sums
            sums += torch.tensor(state["sums"], device=device)
        say(f"going on from step {step} of {c.out_dir}")
    elif c.init_from:
        start = run_folder.find_checkpoint(c.init_from)
        before, weights = run_folder.load_checkpoint(start, "codec", "ema")
        run_folder.load_weights(model, weights, start)
        run_folder.check_shapeless(c, before, start)
        check_codec(c.data_dir, start)
        ema.load_state_dict(model.state_dict())
    if step >= c.steps:
        run_folder.close_run()
        return say(f"{c.out_dir} is complete: {step} of {c.steps} steps")

    if common.compiles(c, device):
        for block in blocks:  # blocks of a kind share their compiled code
            block.compile(dynamic=True)
    trained = common.distribute(model, world, device)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters; {len(train):,} clips, {len(val)} for validation; "
        f"{world} x {c.batch_size} x {c.grad_accum_steps} clips a step; {device.type}, {dtype}")
    prompts, judges = [], []
    if rank == 0:
        keep_codec(c.data_dir, Path(c.out_dir) / "codec")
        log = run_folder.open_log(c, __file__, checkpoint, state)
        if c.sample_every:
            speaker = CodecSpeaker(ema, asdict(c), load_codec(c.data_dir, device))
            prompts = make_prompts(c, data, val, speaker)
            write_references(speaker, prompts, Path(c.out_dir) / "samples" / "reference")
            if c.cross_every:
                labels = [p["label"] for p in prompts]
                judges = load_recognisers([c.eval_recogniser], labels, data.grammar, device, quick=True,
                                          language=c.language)

    def batches(place):
        """From a place in the data on: this process's micro-batches, each with the counts of its step over all
        processes, and beside it the step's draws and the place behind it."""
        micro = c.batch_size * world
        for pairs, behind in steps(c.seed, train, lambda clips: data.frames[clips], micro * c.grad_accum_steps, place,
                                   step * (place is None)):
            draws = [draw(c, *pair) for pair in pairs]
            n = dict(zip(("n_frames", "n_texts", "n_ends"), torch.tensor(counts(c, data, draws), dtype=torch.float32)))
            for i in range(0, len(draws), micro):
                batch = make_batch(c, data, features, draws[i + rank:i + micro:world], device)
                yield batch | send(n, device), (draws, behind)

    def loss_alone(one):
        """Of a single draw, as it is now."""
        with autocast(device, dtype):
            entropy, *_, duration = codec_loss(c, model, make_batch(c, data, features, [one], device))
        return entropy + duration

    def learn(batch):
        """Adds a micro-batch's gradients. Returns its part of the step's losses and hits of each book and, last, of the
        duration's loss, (2 Q + 1,)."""
        with autocast(device, dtype):
            entropy, of_books, hits, duration = codec_loss(c, trained, batch)
        duration = duration / batch["n_texts"]
        loss = entropy / (batch["n_frames"] * c.codebooks) + c.duration_loss_weight * duration
        scaler.scale(loss * world).backward()  # DDP takes the mean over processes
        targets = batch["n_frames"] + F.pad(batch["n_ends"][None], (0, c.codebooks - 1))  # the first book has EOS too
        return torch.cat((of_books / batch["n_frames"], hits / targets, duration.detach()[None]))

    learn = replayed(learn, device, world)
    watch = finite.Watch(device, optimizers, scaler)
    source = ahead(batches(place), device)
    batch, (draws, behind) = next(source)
    since = time.perf_counter()
    bar = tqdm(total=c.steps, initial=step, unit="step", disable=rank != 0, mininterval=1, smoothing=0.05)
    while step < c.steps:
        # Schedule: linear warm-up, then a cosine from lr to min_lr
        progress = max(0, step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        lr = c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        lr *= min(1, (step + 1) / max(1, c.warmup_steps))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr

        # Gradient of the mean over all codes of all micro-batches of all processes
        model.train()
        if c.dropout:
            torch.manual_seed(int(np.random.default_rng([c.seed, 3, step, rank]).integers(2**62)))
        losses = torch.zeros(2 * c.codebooks + 1, device=device)
        for i in range(c.grad_accum_steps):
            last = i == c.grad_accum_steps - 1
            with common.memory_advice(c, "clips"), nullcontext() if last or world == 1 else trained.no_sync():
                losses += learn(batch)
            batch, upcoming = next(source)

        # Step, which changes nothing where a loss or the gradient is not finite
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        good = watch.see(step + 1, draws, losses, norm)
        sums += torch.cat((losses, torch.stack((norm, good)) * (rank == 0))).where(good > 0, 0)
        place, (draws, behind) = behind, upcoming
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
        scaler.update()
        decay = min(c.ema_decay, (1 + step) / (10 + step))  # a shorter memory while it is young
        with torch.no_grad():
            finite.lerp_unless(watch.bad, [*ema.parameters()], [*model.parameters()], 1 - decay)
        step += 1
        bar.update()

        # Log
        if step % c.log_every == 0 or step == c.steps:
            n, took = step % c.log_every or c.log_every, time.perf_counter() - since
            *totals, finite_steps = all_sum(sums.tolist(), device)
            *means, duration, norm = (total / finite_steps if finite_steps else math.nan for total in totals)
            loss, accuracy = by_book("loss", means[:c.codebooks]), by_book("accuracy", means[c.codebooks:])
            if rank == 0:
                log(step, **loss, **accuracy, duration_loss=duration, grad_norm=norm, lr=lr,
                    steps_per_second=n / took, clips_per_second=n / took * c.batch_size * world * c.grad_accum_steps,
                    **common.gpu_memory(device))
                bar.set_postfix_str(f"loss {loss['loss']:.3f}", refresh=False)
            if step % c.log_every == 0:
                sums.zero_()
        # several processes agree on it only where they talk anyway
        stopping = (world == 1 or step % c.log_every == 0) and all_sum([stop.is_set()], device)[0] > 0

        # Steps that were left out
        if stopping or step == c.steps or step % min(c.log_every, finite.IN_A_ROW) == 0:
            watch.tell(step, loss_alone, lambda one: data.rows[one["clip"]]["id"], rank == 0 and log)
        ending = stopping or watch.must_stop()

        # Evaluate and save
        is_best, evaluates = False, step % c.eval_every == 0 or step == c.steps
        if evaluates:
            found = watch.validate(lambda clips: validate(c, ema, data, features, clips, rank, world, device, dtype),
                                   val, lambda clip: data.rows[clip]["id"])
            is_best, best = found["val_loss"] < best, min(best, found["val_loss"])  # of a number and NaN the number
            if rank == 0:
                log(step, **found)
                bar.write(f"step {step}: validation loss {found['val_loss']:.4f}, perplexity "
                          f"{found['val_perplexity']:.4g}, right {found['val_accuracy']:.1%}")
        if speaks := prompts and (step % c.sample_every == 0 or step == c.steps):
            folder = Path(c.out_dir) / "samples" / f"step_{step:08d}"
            wer = write_samples(speaker, prompts, judges, folder)
            if judges:
                log(step, wer=wer)
            heard = f"word error rate {wer:.1%} on " if judges else ""
            bar.write(f"step {step}: {heard}{len(prompts)} samples in {folder}")
        if is_best or ending or step % c.save_every == 0 or step == c.steps:
            weights = {"model": model.state_dict(), "ema": ema.state_dict()}
            run_folder.save_run(c, step, weights, optimizers, scaler, is_best, best=best, place=place,
                                sums=all_sum(sums.tolist(), device), wandb_id=log.wandb_id if rank == 0 else None)
        if rank == 0 and (evaluates or speaks or ending):
            write_page(c.out_dir, parameters=f"{parameters:,}", defaults=asdict(Config()))
        if step % c.log_every == 0:  # evaluation does not count as training time
            since = time.perf_counter()
        if ending:
            break
    run_folder.close_run()  # once the last save is on the disk
    watch.end(step, c.out_dir)
    if stopping:
        say(f"stopped by a signal after step {step}; the same command with --resume goes on")


if __name__ == "__main__":
    common.run(main, sys.argv[1:])
