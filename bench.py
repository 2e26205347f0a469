"""Sizes and speeds.

    python bench.py params configs/*.yaml    parameters and FLOPs of a training step, a row a config
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import UserError, load_config, read_yaml, run

SECONDS, TEXT_BYTES = 6.57, 100  # of LJSpeech's mean clip


def flow_row(path):
    """Parameters by part and FLOPs of one step of a flow TTS config. Shapes alone are computed: nothing is loaded."""
    from model import FlowTTS
    from train_flow_tts import Config, flow_loss

    c = load_config(Config, ["--config", path])
    with torch.device("meta"):
        model = FlowTTS(c)
        frames = -(-int(SECONDS * c.sample_rate / c.hop_length) // c.patch) * c.patch
        mel, each = torch.empty(c.batch_size, frames, c.n_mels), torch.empty(c.batch_size)
        text = torch.empty(c.batch_size, TEXT_BYTES, c.byt5_width)
        batch = {"mel": mel, "noise": mel, "t": each, "drop": each.bool(), "frames": each.long(), "length": each.long(),
                 "text": text[..., 0].long() if c.text_encoder == "bytes" else text}
        with FlopCounterMode(display=False) as flops:
            sum(flow_loss(c, model, batch)).backward()

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    trained, blocks = count(model), count(model.blocks)
    text = count(model.text_input, model.text_blocks, model.duration)
    frozen = 0 if c.text_encoder == "bytes" else byt5_parameters()
    return {"config": Path(path).name, "total": trained + frozen, "trained": trained, "text": text, "blocks": blocks,
            "rest": trained - text - blocks, "frozen": frozen, "clips a step": c.batch_size * c.grad_accum_steps,
            "TFLOP a step": flops.get_total_flops() * c.grad_accum_steps / 1e12}


def byt5_parameters():
    """Of ByT5-small's encoder, from its published shape."""
    from transformers import T5Config, T5EncoderModel

    shape = T5Config(vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6,
                     feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return sum(p.numel() for p in T5EncoderModel(shape).parameters())


def params(paths):
    """Print the table of `bench.py params`."""
    if not paths:
        raise UserError("name the configs: python bench.py params configs/*.yaml")
    rows = []
    for path in paths:
        if (system := read_yaml(path).get("system", "flow")) != "flow":
            raise UserError(f"{path} is of the unknown system {system!r}")
        rows.append(flow_row(path))
    shown = {int: "{:,}", float: "{:.3f}", str: "{}"}
    cells = [list(rows[0]), *([shown[type(value)].format(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, *numbers in cells:
        print("  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:]))]))
    print(f"FLOPs: matrix products, forward and backward, for clips of {SECONDS} s and {TEXT_BYTES} bytes of text")


def main(argv):
    if argv[:1] == ["params"]:
        return params(argv[1:])
    raise UserError(__doc__)


if __name__ == "__main__":
    run(main, sys.argv[1:])
