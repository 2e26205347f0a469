"""Train the LLM text-to-speech model: characters and then codes, one token at a time.

    python train_llm_tts.py --config configs/llm_demo.yaml
    torchrun --nproc-per-node 8 train_llm_tts.py --config configs/llm_177m.yaml --batch_size 10

All that makes up the experiment stands below, in the order in which it happens. Edit it and run it again.

Steps walk through shuffled epochs; where the walk stands is in every checkpoint. So a run that was killed goes on as if
it had not been, and as every process makes the same walk and takes its share of each step, a result does not depend on
how many there are. Dropout alone does: its masks come from (seed, step, rank).
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
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from model import LLM, LLMConfig, packed_batch, sentence
from trivox.audio import log_mel
from trivox.checkpoints import characters_of, check_codec, digest, initial_weights, keep_base
from trivox.codecs import load_codec
from trivox.common import Folder, Fraction, Limit, NotNegative, Positive, Share, Top, UserError, all_sum, autocast
from trivox.cross_entropy import linear_cross_entropy
from trivox.datasets import SentenceDataset, best_fit, keep_codec, open_tokens
from trivox.gpu import ahead, send
from trivox.metrics import perplexity, score_sentences
from trivox.muon import Muon
from trivox.options import read_options
from trivox.order import walk
from trivox.pages import write_page
from trivox.plots import plot_coverage
from trivox.recognisers import load_recognisers
from trivox.samples import write_references, write_samples
from trivox.speak import Clip, LLMSpeaker, decode, speakable


@dataclass
class Config(common.RunConfig, LLMConfig):
    # data
    data_dir: Folder = "data/demo_llm"
    overfit: NonNegativeInt = 0  # train on the first N sentences alone, and validate on the same
    packed: bool = True  # rows of `context` tokens with many sentences each; else a sentence a row, of any length
    document_mask: bool = True  # of packed rows: no sentence sees its neighbours
    speaker_embedder: Literal["ecapa", "stats"] = "ecapa"  # where speaker_width asks for voices
    code_noise: Share = 0.0  # the share of the codes read in training that are drawn anew, so that a wrong one leads to
    # no more: in sampling the model reads its own
    # optimisation
    text_loss_weight: NotNegative = 1.0  # of a character's cross-entropy, beside a code's 1
    batch_size: PositiveInt = 80  # rows per process and micro-step
    grad_accum_steps: PositiveInt = 1
    steps: NonNegativeInt = 150_000
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: for the matrices of the blocks, with adamw for all else
    lr: NotNegative = 2e-4
    min_lr: NotNegative = 2e-5
    warmup_steps: NonNegativeInt = 2000
    weight_decay: NotNegative = 0.01  # of the matrices of the blocks
    grad_clip: Limit = 1.0
    ema_decay: Fraction = 0.999
    init_from: str = ""  # start from these weights, with a fresh optimizer: a run, or a checkpoint of Echolancer's
    # evaluation
    eval_every: PositiveInt = 1000  # steps; the validation loss chooses the checkpoint `best`
    eval_clips: PositiveInt = 512  # held-out sentences that it is taken of, at most
    sample_every: NonNegativeInt = 5000  # steps; 0 for never
    eval_prompts: str = "heldout"  # heldout, or overfit (sentences trained on)
    eval_samples: PositiveInt = 8  # how many of them are spoken, with the same seeds each time
    eval_seconds: Positive = 15.0  # of a sentence, at most
    eval_temperature: NotNegative = 0.8
    eval_top_k: NonNegativeInt = 0  # most probable codes to choose from, 0 for all
    eval_top_p: Top = 0.92  # choose among the most probable codes that together have this probability
    eval_repetition_penalty: Positive = 1.0  # for codes that were spoken before, 1 for none
    eval_recogniser: Literal["auto", "whisper", "tiny", "grammar", "sentences", "open"] = "auto"
    # run: the rest is common.RunConfig
    out_dir: Folder = "runs/llm"
    save_every: PositiveInt = 1000  # steps


# ------------------------------------------------------------------------------------------------------------
# Batches

def rows_from(c, data, clips, count, place):
    """Step after step of `count` rows, for ever, from a place in the data on: yields (rows, each a list of clips; the
    place behind them)."""
    def arrange(pairs, rng):
        some = np.array([clip for _, clip in pairs])
        lengths = sum(data.lengths(some)) + 3
        if c.packed:
            rows = best_fit(lengths, c.context)
            return [some[rows[i]].tolist() for i in rng.permutation(len(rows))]
        rows = some[np.argsort(lengths, kind="stable"), None].tolist()  # steps of about equally long ones, in any order
        steps = [rows[i:i + count] for i in range(0, len(rows), count)]
        return [row for i in rng.permutation(len(steps)) for row in steps[i]]

    return walk(c.seed, clips, count, 4096 if c.packed else 16 * count, arrange, place, within=True)


def speakers_clips(data, train, val):
    """{speaker: the clips that show its voice}: those trained on, and for voices that are not, the held-out ones."""
    shown = {}
    for clips in (val, train):
        speakers = data.speaker(clips)
        shown |= {int(speaker): clips[speakers == speaker] for speaker in np.unique(speakers)}
    return shown


def draw_voice(c, data, shown, clip, *key):
    """The embedding of a sentence of the speaker's, drawn by a key, so that it does not tell what is said in this one;
    that of the clip itself where the speaker is not known."""
    if (speaker := int(data.speaker([clip])[0])) >= 0:
        clip = np.random.default_rng([c.seed, *key]).choice(shown[speaker])
    return torch.from_numpy(data.embedding(clip))


def make_batch(c, data, shown, rows, step, device):
    """The tensors of a micro-batch, on the device. Without packing, lengths are padded to multiples of 16."""
    sentences = [[sentence(c, data.characters(i), data.codes(i)) for i in row] for row in rows]
    steps = c.context if c.packed else min(c.context, -(-max(len(row[0]) - 1 for row in sentences) // 16) * 16)
    tokens, targets, document = packed_batch(sentences, steps)
    if c.code_noise:
        for own, row in zip(tokens, rows):
            rng = np.random.default_rng([c.seed, 7, step, row[0]])
            noisy = torch.from_numpy(rng.random(steps) < c.code_noise) & (own >= c.first_code) & (own < c.audio_bos)
            own[noisy] = c.first_code + torch.from_numpy(rng.integers(0, c.codebook_size, int(noisy.sum())))
    audio = (targets >= c.first_code) & (targets != c.audio_bos)
    at = [torch.from_numpy(np.flatnonzero(taught.numpy())) for taught in (audio, (targets >= 0) & ~audio)]
    batch = {"tokens": tokens, "targets": targets.flatten(), "audio_at": at[0], "text_at": at[1]}
    if c.packed and c.document_mask:
        batch["document"] = document
    if c.speaker_width:
        batch["speaker"] = torch.stack([draw_voice(c, data, shown, i, 3, step, i) for i, in rows])
    return send(batch, device)


def counts(data, rows):
    """How many characters and how many codes these rows teach, with the ends of both."""
    codes, characters = data.lengths(np.array([i for row in rows for i in row]))
    return int((characters + 2).sum()), int((codes + 1).sum())


def fitting(c, data, clips, say):
    """Those clips whose characters and codes the context has room for: without its end a sentence would teach to stop
    anywhere. How many others there are is said. Raises UserError where none fits."""
    lengths = sum(data.lengths(clips)) + 3  # BOS, EOS and the end of the codes
    if (fits := lengths <= c.context).all():
        return clips
    if not fits.any():
        raise UserError(f"a context of {c.context} has room for no clip of {c.data_dir}, the shortest of which takes "
                        f"{lengths.min():,} steps: raise --context")
    say(f"note: {(~fits).sum():,} of {len(clips):,} clips of {c.data_dir} take more than the context's {c.context:,} "
        f"steps, and are left out: --context {lengths.max()} has room for all")
    return clips[fits]


# ------------------------------------------------------------------------------------------------------------
# Loss

def llm_loss(model, batch):
    """The cross-entropies of a micro-batch, summed over its characters and over its codes."""
    inner = common.unwrapped(model)
    x = model(batch["tokens"], batch.get("document"), batch.get("speaker")).flatten(0, 1)
    return [linear_cross_entropy(x[at], inner.embedding.weight, batch["targets"][at][:, None])[0]
            for at in (batch["text_at"], batch["audio_at"])]


# ------------------------------------------------------------------------------------------------------------
# Evaluation

def measures(c, text, audio, n_text, n_audio):
    """What the log has of cross-entropies: the loss, and the perplexities of characters and of codes."""
    return {"loss": (c.text_loss_weight * text + audio) / (c.text_loss_weight * n_text + n_audio),
            "text_perplexity": perplexity(text / n_text), "audio_perplexity": perplexity(audio / n_audio)}


def validate(c, model, data, shown, clips, rank, world, device, dtype):
    """Those numbers of some held-out sentences, with the same voices each time."""
    clips = [clips[i] for i in np.argsort(sum(data.lengths(clips)))[rank::world]]
    voices = [draw_voice(c, data, shown, i, 4, i) for i in clips] if c.speaker_width else []
    sums = score_sentences(model, data, clips, torch.stack(voices) if voices else None, device, dtype)
    return {f"val_{key}": value for key, value in measures(c, *all_sum(sums.tolist(), device)).items()}


def make_prompts(c, data, shown, clips, speaker):
    """The sentences that are spoken again and again, with the same voices each time; see trivox/samples.py."""
    prompts = []
    for n, clip in enumerate(speakable(c, data, clips)[:c.eval_samples]):
        text, own = data.text(clip), int(data.speaker([clip])[0])
        wav = decode(speaker.codec, torch.from_numpy(data.codes(clip)[:, None].astype(int)))
        prompts.append({"request": {"text": text, "seed": n}, "label": text,
                        "reference": Clip(wav, log_mel(wav, speaker.mel))})
        if c.speaker_width:
            prompts[n]["request"]["speaker"] = draw_voice(c, data, shown, clip, 6, clip)
            prompts[n]["label"] = f"{data.speakers[own]}: {text}" if own >= 0 else text
    return prompts


def show_coverage(c, data, clips, path, limit=8_000_000):
    """Plot which share of the codes the most frequent ones make up, beside the characters: Echolancer explains the high
    perplexity of its codes by how evenly they are used. Returns the perplexity of codes that only their frequencies
    tell, over the first `limit`."""
    some = clips[:1 + int(np.searchsorted(np.cumsum(data.lengths(clips[:limit // 100])[0]), limit))]
    codes = np.bincount(np.concatenate([data.codes(i) for i in some]), minlength=data.codec["codebook_size"])
    characters = np.bincount(np.concatenate([data.characters(i) for i in some]), minlength=c.first_code)
    plot_coverage(path, {f"{data.codec['codec']} codes": codes, "characters": characters})
    p = codes[codes > 0] / codes.sum()
    return math.exp(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------------------------------------
# The run

def main(argv):
    c = common.load_config(Config, argv)
    if c.speaker_width and c.packed:
        raise UserError("speaker_width gives a row one voice, so that it should hold one sentence: set packed to false")
    if c.lora_rank and not (c.init_from and c.optimizer == "adamw"):
        raise UserError("lora_rank trains an adapter for a model that is there already, named by --init_from, by adamw")
    read_options("llm", asdict(c), {})  # refuses a wrong eval_* now, not at the first sample
    stop, rank, world, device, dtype = common.begin(c)
    say = print if rank == 0 else lambda text: None

    # Data
    data = open_tokens(SentenceDataset, c.data_dir, c, c.language)
    train, val = data.clips("train"), data.clips("val")
    if c.overfit:
        train = val = data.clips("all")[:c.overfit]
    train, val = (fitting(c, data, clips, say) for clips in (train, val))
    shown = {}
    if c.speaker_width:
        data.load_embeddings(c.speaker_embedder, c.speaker_width)
        known = np.isin(data.speaker(val), data.speaker(train))  # a voice that is never trained on is for evaluate.py
        val = val[known] if known.any() else val
        shown = speakers_clips(data, train, val)

    # Model
    checkpoint = run_folder.open_run(c)
    c.characters = characters_of(c, checkpoint, data.alphabet.symbols)
    data.read_in(c.characters)
    model = LLM(c)
    if c.lora_rank:
        c.init_from = keep_base(c.init_from, c.out_dir, checkpoint)
    if c.init_from and (c.lora_rank or not checkpoint):
        initial_weights(model, c.init_from, c.data_dir)
    base = digest(model.state_dict()) if c.lora_rank else None
    if c.speaker_width and c.speaker_embedder == "stats" and not model.speaker_mean.any():
        voices = torch.stack([torch.from_numpy(data.embedding(i)) for i in train[:4000]])
        model.speaker_mean.copy_(voices.mean(0))
        model.speaker_std.copy_(voices.std(0, correction=0).clamp(min=1e-3))
    model = model.to(device)
    model.checkpointing = c.activation_checkpointing
    ema = deepcopy(model)  # a moving average of the weights; it is what is evaluated and what speaks
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = [a for a, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]

    def weights(model):
        """What is saved: all, or the adapter alone and by what to know the model that it is for."""
        state = model.state_dict()
        return {key: x for key, x in state.items() if "lora_" in key} | {"base": base} if c.lora_rank else state

    # Optimizer: Muon (Jordan et al., 2024) for the matrices of the blocks, or AdamW for all
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    adamw = dict(lr=c.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    if c.optimizer == "muon":
        optimizers = [Muon(matrices, c.lr, c.weight_decay), torch.optim.AdamW(others, weight_decay=0, **adamw)]
    else:
        optimizers = [torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                         {"params": others, "weight_decay": 0}], **adamw)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run stands
    step, best, place, state = 0, float("inf"), None, None
    sums = torch.zeros(6, device=device)  # since the last line of the log, over its finite steps
    if checkpoint:
        state = run_folder.load_run(checkpoint, c, {"model": model, "ema": ema}, optimizers, scaler, base)
        check_codec(c.data_dir, checkpoint)
        step, best, place = state["step"], state["best"], state["place"]
        if isinstance(place, list):  # of an older run: an epoch, a pool in it, and how many of its rows are behind
            taken = place[1] * (4096 if c.packed else 16 * c.batch_size * c.grad_accum_steps * world)
            place = {"taken": place[0] * len(train) + taken, "behind": place[2]}
        if len(state["sums"]) == len(sums) and rank == 0:  # the total of all processes; older runs had other sums
            sums += torch.tensor(state["sums"], device=device)
        say(f"going on from step {step} of {c.out_dir}")
    if step >= c.steps:
        run_folder.close_run()
        return say(f"{c.out_dir} is complete: {step} of {c.steps} steps")

    if common.compiles(c, device):
        torch._dynamo.config.optimize_ddp = False  # DDP reduces between blocks; FlexAttention's is not to be cut
        for block in model.blocks:  # blocks of a kind share their compiled code
            block.compile(dynamic=not c.packed)
    trained = common.distribute(model, world, device)
    total, learning = (sum(p.numel() for p in some) for some in (model.parameters(), parameters))
    say(f"{total:,} parameters" + f", {learning:,} of them trained ({learning / total:.2%})" * (learning < total)
        + f"; {len(train):,} sentences, {len(val):,} for validation; {world} x {c.batch_size} x {c.grad_accum_steps} "
        f"rows a step; {device.type}, {dtype}")
    prompts = []
    if rank == 0:
        keep_codec(c.data_dir, Path(c.out_dir) / "codec")
        log = run_folder.open_log(c, __file__, checkpoint, state)
        unigram = show_coverage(c, data, train, Path(c.out_dir) / "coverage.png")
        if c.sample_every:
            speaker = LLMSpeaker(ema, asdict(c), load_codec(c.data_dir, device))
            prompts = make_prompts(c, data, shown, train if c.eval_prompts == "overfit" else val, speaker)
            write_references(speaker, prompts, Path(c.out_dir) / "samples" / "reference")
            texts = [p["request"]["text"] for p in prompts]
            judges = load_recognisers([c.eval_recogniser], texts, data.grammar, device, quick=True, language=c.language)

    def batches(step, place):
        """From `step` and its place on: this process's micro-batches, each with the counts of its step over all
        processes and the place behind it."""
        micro = c.batch_size * world
        for rows, behind in rows_from(c, data, train, micro * c.grad_accum_steps, place):
            for i in range(0, len(rows), micro):
                yield (make_batch(c, data, shown, rows[i + rank:i + micro:world], step, device),
                       (*counts(data, rows), rows, behind))
            step += 1

    def loss_alone(one):
        """Of a row of a single clip in a step, as it is now."""
        with autocast(device, dtype):
            return sum(llm_loss(model, make_batch(c, data, shown, [one[0]], one[1], device)))

    watch = finite.Watch(device, optimizers, scaler)
    source = ahead(batches(step, place), device)
    batch, (n_text, n_audio, rows, behind) = next(source)
    since = time.perf_counter()
    bar = tqdm(total=c.steps, initial=step, unit="step", disable=rank != 0, mininterval=1, smoothing=0.05)
    while step < c.steps:
        # Schedule: linear warm-up, then a cosine from lr to min_lr
        progress = max(0, step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        lr = c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        lr *= min(1, (step + 1) / max(1, c.warmup_steps))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr

        # Gradient of the mean over all tokens of all micro-batches of all processes
        model.train()
        if c.dropout or c.lora_rank:
            torch.manual_seed(int(np.random.default_rng([c.seed, 5, step, rank]).integers(2**62)))
        losses = torch.zeros(2, device=device)
        for i in range(c.grad_accum_steps):
            last = i == c.grad_accum_steps - 1
            with common.memory_advice(c, "rows"), nullcontext() if last or world == 1 else trained.no_sync():
                with autocast(device, dtype):
                    text, audio = llm_loss(trained, batch)
                loss = (c.text_loss_weight * text + audio) / (c.text_loss_weight * n_text + n_audio)
                scaler.scale(loss * world).backward()  # DDP takes the mean over processes
            losses += torch.stack((text, audio)).detach()
            batch, upcoming = next(source)

        # Step, which changes nothing where a loss or the gradient is not finite
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip)
        good = watch.see(step + 1, [([clip], step) for row in rows for clip in row], losses, norm)
        told = torch.stack((good * n_text, good * n_audio, norm, good)) * (rank == 0)  # numbers that no GPU waits for
        sums += torch.cat((losses, told)).where(good > 0, 0)
        place, (n_text, n_audio, rows, behind) = behind, upcoming
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        decay = min(c.ema_decay, (1 + step) / (10 + step))  # a shorter memory while it is young
        with torch.no_grad():
            finite.lerp_unless(watch.bad, averages, parameters, 1 - decay)
        step += 1
        bar.update()

        # Log
        if step % c.log_every == 0 or step == c.steps:
            n, took = step % c.log_every or c.log_every, time.perf_counter() - since
            *totals, norm, finite_steps = all_sum(sums.tolist(), device)
            if rank == 0:
                found = measures(c, *totals) if finite_steps else {"loss": math.nan}
                log(step, **found, grad_norm=norm / max(finite_steps, 1), lr=lr, steps_per_second=n / took,
                    tokens_per_second=(totals[2] + totals[3]) / took, **common.gpu_memory(device))
                bar.set_postfix_str(f"loss {found['loss']:.3f}", refresh=False)
            if step % c.log_every == 0:
                sums.zero_()
        # several processes agree on it only where they talk anyway
        stopping = (world == 1 or step % c.log_every == 0) and all_sum([stop.is_set()], device)[0] > 0

        # Steps that were left out
        if stopping or step == c.steps or step % min(c.log_every, finite.IN_A_ROW) == 0:
            watch.tell(step, loss_alone, lambda one: data.name(one[0][0]), rank == 0 and log)
        ending = stopping or watch.must_stop()

        # Evaluate and save
        is_best, evaluates = False, step % c.eval_every == 0 or step == c.steps
        if evaluates:
            found = watch.validate(lambda clips: validate(c, ema, data, shown, clips, rank, world, device, dtype),
                                   val[:c.eval_clips].tolist(), data.name)
            is_best, best = found["val_loss"] < best, min(best, found["val_loss"])  # of a number and NaN the number
            if rank == 0:
                log(step, **found)
                bar.write(f"step {step}: validation loss {found['val_loss']:.4f}, perplexity of characters "
                          f"{found['val_text_perplexity']:.4g}, of codes {found['val_audio_perplexity']:.4g} "
                          f"({unigram:.0f} by their frequencies)")
        if speaks := prompts and (step % c.sample_every == 0 or step == c.steps):
            folder = Path(c.out_dir) / "samples" / f"step_{step:08d}"
            wer = write_samples(speaker, prompts, judges, folder)
            if judges:
                log(step, wer=wer)
            heard = f"word error rate {wer:.1%} on " if judges else ""
            bar.write(f"step {step}: {heard}{len(prompts)} prompts, in {folder}")
        if is_best or ending or step % c.save_every == 0 or step == c.steps:
            run_folder.save_run(c, step, {"model": weights(model), "ema": weights(ema)}, optimizers, scaler, is_best,
                                best=best, place=place, sums=all_sum(sums.tolist(), device),
                                wandb_id=log.wandb_id if rank == 0 else None)
        if rank == 0 and (evaluates or speaks or ending):
            write_page(c.out_dir, parameters=f"{total:,}", trained=f"{learning:,}", defaults=asdict(Config()))
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
