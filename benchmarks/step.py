"""A training step on random data, which bench.py times and benchmarks/memory.py weighs."""

import torch

from trivox.common import pick_dtype

SECONDS, TEXT_BYTES = 6.57, 100  # of LJSpeech's mean clip


def random_batch(c, device):
    """What a micro-batch of a config holds, of random data: clips as long as LJSpeech's mean, whole contexts, rows of
    sentences. Returns (a dict of tensors; how many clips or, for an LLM TTS, tokens are learned from)."""
    import numpy as np

    from model import delayed_batch, packed_batch, sentence
    from trivox.datasets import best_fit

    rng, B = np.random.default_rng(0), c.batch_size
    if c.system == "flow":
        frames = int(SECONDS * c.sample_rate / c.hop_length)
        mel = torch.randn(B, -(-frames // (16 * c.patch)) * 16 * c.patch, c.n_mels)
        text = torch.randn(B, 112, c.byt5_width) if c.text_encoder != "bytes" else torch.randint(3, 259, (B, 112))
        batch = {"mel": mel, "noise": torch.randn_like(mel), "frames": torch.full((B,), frames), "text": text,
                 "length": torch.full((B,), TEXT_BYTES), "t": torch.rand(B), "drop": torch.zeros(B, dtype=torch.bool)}
        return {name: x.to(device) for name, x in batch.items()}, B
    if c.system == "codec":
        frames = c.context - c.codebooks - (c.cross_every > 0)
        clips = [torch.from_numpy(rng.integers(0, c.codebook_size, (frames, c.codebooks))) for _ in range(B)]
        batch = {"tokens": delayed_batch(c, clips, multiple=16), "frames": torch.full((B,), frames)}
        if c.cross_every:
            batch |= {"text": torch.randint(3, 259, (B, 112)), "length": torch.full((B,), TEXT_BYTES),
                      "drop": torch.zeros(B, dtype=torch.bool)}
        return {name: x.to(device) for name, x in batch.items()}, B
    some = [sentence(c, rng.integers(5, 43, rng.integers(40, 160)).astype(np.uint8),
                     rng.integers(0, c.codebook_size, rng.integers(100, 700)).astype(np.uint16)) for _ in range(4 * B)]
    rows = best_fit(np.array([min(len(one), c.context) for one in some]), c.context)[:B]
    tokens, targets, document = packed_batch([[some[i] for i in row] for row in rows], c.context)
    audio = ((targets >= c.first_code) & (targets != c.audio_bos)).flatten()
    taught = (targets >= 0).flatten()
    batch = {"tokens": tokens, "document": document, "targets": targets.flatten(),
             "text_at": (taught & ~audio).nonzero()[:, 0], "audio_at": (taught & audio).nonzero()[:, 0]}
    if c.speaker_width:
        batch["speaker"] = torch.randn(B, c.speaker_width)
    return {name: x.to(device) for name, x in batch.items()}, int(taught.sum())


def training(c, device):
    """A config's model on the device, and step(batch), which trains it as its trainer does in one process, on the same
    micro-batch over and over, and returns the sum of its losses, (1,)."""
    from model import LLM, CodecLM, FlowTTS
    from train_codec_lm import codec_loss
    from train_flow_tts import flow_loss
    from train_llm_tts import llm_loss
    from trivox.finite import Watch, lerp_unless
    from trivox.gpu import replayed
    from trivox.muon import Muon

    torch.manual_seed(0)
    with device:
        model = {"flow": FlowTTS, "codec": CodecLM, "llm": LLM}[c.system](c).train()
    dtype, model.checkpointing = pick_dtype(c.dtype, device), c.activation_checkpointing
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    blocks = [*model.blocks, *(model.encode_text.blocks if hasattr(model, "encode_text") else [])]
    if c.compile and device.type == "cuda":
        for block in blocks:
            block.compile(dynamic=c.system != "llm" or not c.packed)
    matrices = [m.weight for block in blocks for m in block.modules()
                if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    optimizers = [Muon(matrices, 1e-4)] if c.optimizer == "muon" else []
    optimizers += [torch.optim.AdamW(others if optimizers else parameters, lr=1e-4, fused=True)]
    watch = Watch(device, optimizers, torch.amp.GradScaler(device.type, enabled=False))

    def learn(batch):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if c.system == "codec":
                loss = codec_loss(c, model, batch)[0]
            else:
                losses = flow_loss(c, model, batch) if c.system == "flow" else llm_loss(model, batch)
                loss = sum(x.sum() for x in losses)
        (loss / c.batch_size).backward()
        return loss.detach()[None]

    learn = replayed(learn, device, 1) if c.system == "codec" else learn

    def step(batch):
        for _ in range(c.grad_accum_steps):
            loss = learn(batch)
        watch.steps = []
        watch.see(1, [], loss, torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=c.system != "codec")
        with torch.no_grad():
            lerp_unless(watch.bad, averages, parameters, 1e-3)
        return loss

    return model, step
