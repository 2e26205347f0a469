"""Train the flow-matching text-to-speech model: text -> log-mel, and through a vocoder to sound.

    python train_flow_tts.py --config configs/flow_demo.yaml
    torchrun --nproc-per-node 2 train_flow_tts.py --config configs/flow_ljspeech.yaml --batch_size 32

All that makes up the experiment stands below, in the order in which it happens. Edit it and run it again.

What a step draws at random (noise, time, silence, dropped text) comes from (seed, epoch, clip), and which clips it
takes from the seed and from how many were taken before. So a result does not depend on how many processes share the
work, and a run that was killed goes on as if it had not been.
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
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt
from tqdm import tqdm

from model import FlowConfig, FlowTTS
from trivox.audio import LOG_FLOOR, mel_config
from trivox.common import Folder, Fraction, Limit, NotNegative, Share, UserError, all_sum, autocast, barrier
from trivox.datasets import MelDataset
from trivox.files import padded
from trivox.gpu import ahead, send
from trivox.muon import Muon
from trivox.options import read_options
from trivox.order import steps
from trivox.pages import write_page
from trivox.recognisers import load_recognisers
from trivox.samples import write_references, write_samples
from trivox.speak import Clip, FlowSpeaker
from trivox.text import TextFeatures, read_lines


@dataclass
class Config(common.RunConfig, FlowConfig):
    # data
    data_dir: Folder = "data/demo"
    overfit: NonNegativeInt = 0  # train on the first N clips alone, and validate on the same
    cache_text: Literal["auto", "on", "off"] = "auto"  # keep a frozen encoder's states on disk; auto: where they fit
    silence_prob: Share = 0.0  # how often silence is added at the end of a clip, for the duration predictor to learn
    max_silence_sec: NotNegative = 0.5  # of that silence
    # flow matching
    timestep_logit_mean: FiniteFloat = 0.0  # t = 1 - sigmoid(N(mean, std)), and t = 1 is noise
    timestep_logit_std: NotNegative = 1.0
    timestep_uniform: Share = 0.0  # how often t is uniform instead: without some, both ends are hardly ever taught
    text_condition_dropout: Share = 0.1  # how often the text is empty, for classifier-free guidance
    duration_loss_weight: NotNegative = 0.1
    # optimisation
    batch_size: PositiveInt = 32  # clips per process and micro-step
    grad_accum_steps: PositiveInt = 1
    steps: PositiveInt = 1000
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the matrices of the blocks, with adamw for all else
    lr: NotNegative = 1e-3
    min_lr: NotNegative = 6e-5
    warmup_steps: NonNegativeInt = 50
    weight_decay: NotNegative = 0.1  # of the matrices of the blocks
    grad_clip: Limit = 1.0
    ema_decay: Fraction = 0.999
    init_from: str = ""  # start from the weights of this checkpoint, with a fresh optimizer
    # evaluation
    eval_every: PositiveInt = 500  # steps; the validation loss chooses the checkpoint `best`
    speak_every: NonNegativeInt = 1000  # steps; 0 for never
    eval_prompts: str = "heldout"  # heldout, overfit (the first clips trained on), or a file with a sentence a line
    eval_prompts_max: PositiveInt = 8
    eval_steps: PositiveInt = 16  # of the solver
    eval_cfg_scale: NotNegative = 2.0  # guidance by the text, 1 for none
    eval_temperature: NotNegative = 1.0  # deviation of the noise that a clip begins as
    eval_solver: Literal["euler", "midpoint", "heun"] = "euler"
    eval_vocoder: Literal["griffinlim", "bigvgan"] = "griffinlim"
    eval_recogniser: Literal["auto", "whisper", "tiny", "grammar", "sentences", "open"] = "auto"
    # run: the rest is common.RunConfig
    out_dir: Folder = "runs/flow"


# ------------------------------------------------------------------------------------------------------------
# Batches

def draw(c, epoch, clip):
    """What is random about a clip in an epoch, as a dict: clip, t, drop, silence in frames, the seed of its noise."""
    rng = np.random.default_rng([c.seed, 0, epoch, clip])
    silence = rng.random() * c.max_silence_sec * (rng.random() < c.silence_prob)
    t = 1 - 1 / (1 + np.exp(-(c.timestep_logit_mean + c.timestep_logit_std * rng.standard_normal())))
    drop, noise = rng.random() < c.text_condition_dropout, int(rng.integers(2**62))
    if rng.random() < c.timestep_uniform:
        t = 1 - rng.random()  # above 0, up to 1, where sampling begins
    return {"clip": clip, "t": t, "drop": drop, "silence": int(silence * c.sample_rate / c.hop_length), "noise": noise}


def make_batch(c, data, features, draws, device):
    """The tensors of a micro-batch, on the device, to which float16 goes as the disk holds it, and is float32 there.
    Lengths are padded to multiples of 16: so there are fewer shapes."""
    text, length = features.stored(["" if d["drop"] else data.rows[d["clip"]]["text"] for d in draws], multiple=16)
    frames = [int(data.frames[d["clip"]]) + d["silence"] for d in draws]
    longest = -(-max(frames) // (16 * c.patch)) * 16 * c.patch
    batch = {
        "mel": padded([data.numbers(d["clip"]) for d in draws], longest),  # (B, T, n_mels)
        "frames": torch.tensor(frames), "text": text, "length": length,
        "t": torch.tensor([d["t"] for d in draws], dtype=torch.float32),
        "drop": torch.tensor([d["drop"] for d in draws]),
    }
    batch = {name: x.float() if x.dtype == torch.float16 else x for name, x in send(batch, device).items()}
    batch["noise"], generator = torch.zeros_like(batch["mel"]), torch.Generator(device)
    for mel, noise, n, d in zip(batch["mel"], batch["noise"], frames, draws):
        if d["silence"]:
            mel[n - d["silence"]:n] = math.log(LOG_FLOOR)
        noise[:n].normal_(generator=generator.manual_seed(d["noise"]))
    return batch


# ------------------------------------------------------------------------------------------------------------
# Loss

def flow_loss(c, model, batch):
    """Of each clip of a micro-batch, both (B,): squared errors of the velocity, summed over frames and averaged over
    mel bands; the squared error of the log of its duration, 0 where it has no text."""
    inner = common.unwrapped(model)
    x, noise, t = (batch["mel"] - inner.mel_mean) / inner.mel_std, batch["noise"], batch["t"][:, None, None]
    velocity, log_seconds = model((1 - t) * x + t * noise, batch["t"], batch["frames"], batch["text"], batch["length"])
    real = torch.arange(x.shape[1], device=x.device) < batch["frames"][:, None]
    flow = ((velocity.float() - (noise - x)).square().mean(-1) * real).sum(1)
    log_length = (batch["frames"] * (c.hop_length / c.sample_rate)).log()
    return flow, (log_seconds - log_length).square() * ~batch["drop"]


def counts(data, draws):
    """The denominators of those sums: frames, and clips with text."""
    return sum(int(data.frames[d["clip"]]) + d["silence"] for d in draws), max(1, sum(not d["drop"] for d in draws))


# ------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def validate(c, model, data, features, clips, rank, world, device, dtype):
    """Mean losses over all validation clips with their text, and that of each tenth of the times t; noise, time and
    added silence are the same each time. Where training draws some times uniformly, those here are spread evenly
    over (0, 1], as sampling visits them."""
    model.eval()
    draws = [draw(c, 0, clip) | {"drop": False} for clip in sorted(clips, key=lambda clip: data.frames[clip])]
    if c.timestep_uniform:
        golden = (math.sqrt(5) - 1) / 2  # whose multiples, modulo 1, are even for any number of clips
        draws = [d | {"t": 1 - (n + 0.5) * golden % 1} for n, d in enumerate(draws)]
    mine, losses = [], [torch.zeros(2, 0, device=device)]
    for i in range(rank * c.batch_size, len(draws), world * c.batch_size):
        mine += (some := draws[i:i + c.batch_size])
        with autocast(device, dtype):
            losses.append(torch.stack(flow_loss(c, model, make_batch(c, data, features, some, device))))
    flow, duration = np.float64(torch.cat(losses, 1).cpu())

    def by_time(draws, values):
        return np.bincount([min(9, int(10 * d["t"])) for d in draws], values, minlength=10) if draws else np.zeros(10)

    *flow, duration = all_sum([*by_time(mine, flow), float(duration.sum())], device)
    n_frames, n_texts = counts(data, draws)
    frames = by_time(draws, [counts(data, [d])[0] for d in draws])
    return {"val_loss": sum(flow) / n_frames, "val_duration_loss": duration / n_texts,
            **{f"val_loss_t{(n + 0.5) / 10:.2f}": flow[n] / frames[n] for n in range(10) if frames[n]}}


def make_prompts(c, data, clips, speaker):
    """The prompts of each sampling, see trivox/samples.py: the first sentences of `clips` beside their recordings, or
    those of a file."""
    texts = [data.rows[i]["text"] for i in clips] or read_lines(c.eval_prompts)
    prompts = [{"request": {"text": text, "seed": n}, "label": text, "reference": None}
               for n, text in enumerate(texts[:c.eval_prompts_max])]
    for prompt, i in zip(prompts, clips):
        prompt["reference"] = Clip(speaker.vocoder(c.eval_vocoder)(mel := data.mel(i)), mel)
    return prompts


# ------------------------------------------------------------------------------------------------------------
# The run

def main(argv):
    c = common.load_config(Config, argv)
    if c.width % (2 * c.heads) or c.text_width % 64:
        raise UserError(f"width {c.width} should be a multiple of twice its {c.heads} heads, and text_width "
                        f"{c.text_width} of 64")
    read_options("flow", asdict(c), {})  # refuses a wrong eval_* now, not at the first sample
    stop, rank, world, device, dtype = common.begin(c)
    say = print if rank == 0 else lambda text: None

    # Data
    data = MelDataset(c.data_dir, mel_config(c), c.language)
    features = TextFeatures(c.text_encoder, device, c.phonemes)
    if rank == 0:
        features.tell_language(c.language)
    train, val = data.clips("train"), data.clips("val")
    if c.overfit:
        train = val = data.clips("all")[:c.overfit]
    for writes in (True, False):  # two rounds: the first process writes the cache of text states, the others read it
        if writes == (rank == 0):
            features.fill_cache(data.folder, [row["text"] for row in data.rows], c.cache_text, writes, c.byt5_width)
        barrier()

    # Model
    model = FlowTTS(c).to(device)
    model.mel_mean.fill_(data.stats["mel_mean"])
    model.mel_std.fill_(data.stats["mel_std"])
    model.checkpointing = c.activation_checkpointing
    ema = deepcopy(model)  # a moving average of the weights; it is what is evaluated and what speaks

    # Optimizer: Muon (Jordan et al., 2024) for the matrices of the blocks
    blocks = [*model.blocks, *model.encode_text.blocks]
    matrices = [m.weight for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adamw = dict(lr=c.lr, betas=(0.9, 0.99), fused=True)
    if c.optimizer == "muon":
        optimizers = [Muon(matrices, c.lr, c.weight_decay),
                      torch.optim.AdamW(others, weight_decay=0, **adamw)]
    else:
        optimizers = [torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                         {"params": others, "weight_decay": 0}], **adamw)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run stands
    step, best, place, state = 0, float("inf"), None, None
    sums = torch.zeros(4, device=device)  # of losses, gradient norms and finite steps since the last line of the log
    checkpoint = run_folder.open_run(c)
    if checkpoint:
        state = run_folder.load_run(checkpoint, c, {"model": model, "ema": ema}, optimizers, scaler)
        step, best, place = state["step"], state["best"], state["place"]
        if len(state["sums"]) == len(sums) and rank == 0:  # the total of all processes; older runs had other sums
            sums += torch.tensor(state["sums"], device=device)
        say(f"going on from step {step} of {c.out_dir}")
    elif c.init_from:
        start = run_folder.find_checkpoint(c.init_from)
        before, weights = run_folder.load_checkpoint(start, "flow", "ema")
        run_folder.load_weights(model, weights, start)
        run_folder.check_shapeless(c, before, start)
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
    prompts = []
    if rank == 0:
        log = run_folder.open_log(c, __file__, checkpoint, state)
        if c.speak_every:
            speaker = FlowSpeaker(ema, asdict(c), features)
            clips = {"heldout": val, "overfit": train}.get(c.eval_prompts, [])
            clips = [i for i in clips if speaker.sayable(data.rows[i]["text"])]
            prompts = make_prompts(c, data, clips, speaker)
            write_references(speaker, prompts, Path(c.out_dir) / "samples" / "reference")
            labels = [p["label"] for p in prompts]
            judges = load_recognisers([c.eval_recogniser], labels, data.grammar, device, quick=True,
                                      language=c.language)

    def batches(place):
        """From a place in the data on: this process's micro-batches, each with the counts of its step over all
        processes, its draws and the place behind it."""
        micro = c.batch_size * world
        for pairs, behind in steps(c.seed, train, lambda clips: data.frames[clips], micro * c.grad_accum_steps, place,
                                   step * (place is None)):
            draws = [draw(c, *pair) for pair in pairs]
            for i in range(0, len(draws), micro):
                yield (make_batch(c, data, features, draws[i + rank:i + micro:world], device),
                       (*counts(data, draws), draws, behind))

    def loss_alone(one):
        """Of a single draw, as it is now."""
        with autocast(device, dtype):
            return torch.cat(flow_loss(c, model, make_batch(c, data, features, [one], device))).sum()

    watch = finite.Watch(device, optimizers, scaler)
    source = ahead(batches(place), device)
    batch, (n_frames, n_texts, draws, behind) = next(source)
    since = time.perf_counter()
    bar = tqdm(total=c.steps, initial=step, unit="step", disable=rank != 0, mininterval=1, smoothing=0.05)
    while step < c.steps:
        # Schedule: linear warm-up, then a cosine from lr to min_lr
        progress = max(0, step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        lr = c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        lr *= min(1, (step + 1) / max(1, c.warmup_steps))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr

        # Gradient of the mean over all frames of all micro-batches of all processes
        model.train()
        losses = torch.zeros(2, device=device)
        for i in range(c.grad_accum_steps):
            last = i == c.grad_accum_steps - 1
            with common.memory_advice(c, "clips"), nullcontext() if last or world == 1 else trained.no_sync():
                with autocast(device, dtype):
                    flow, duration = flow_loss(c, trained, batch)
                flow, duration = flow.sum() / n_frames, duration.sum() / n_texts
                loss = (flow + c.duration_loss_weight * duration) * world  # DDP takes the mean over processes
                scaler.scale(loss).backward()
            losses += torch.stack((flow, duration)).detach()
            batch, upcoming = next(source)

        # Step, which changes nothing where a loss or the gradient is not finite
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        good = watch.see(step + 1, draws, losses, norm)
        sums += torch.cat((losses, torch.stack((norm, good)) * (rank == 0))).where(good > 0, 0)
        place, (n_frames, n_texts, draws, behind) = behind, upcoming
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
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
            flow, duration, norm = (total / finite_steps if finite_steps else math.nan for total in totals)
            if rank == 0:
                log(step, loss=flow, duration_loss=duration, grad_norm=norm, lr=lr, steps_per_second=n / took,
                    clips_per_second=n / took * c.batch_size * world * c.grad_accum_steps, **common.gpu_memory(device))
                bar.set_postfix_str(f"loss {flow:.3f}", refresh=False)
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
                bar.write(f"step {step}: validation loss {found['val_loss']:.4f}")
        if speaks := prompts and (step % c.speak_every == 0 or step == c.steps):
            folder = Path(c.out_dir) / "samples" / f"step_{step:08d}"
            wer = write_samples(speaker, prompts, judges, folder)
            if judges:
                log(step, wer=wer)
            heard = f"word error rate {wer:.1%} on " if judges else ""
            bar.write(f"step {step}: {heard}{len(prompts)} prompts, in {folder}")
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
