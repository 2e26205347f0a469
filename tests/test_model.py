"""model.py: fast paths beside slow ones, padding, the differentiable clock."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_FLOW as TINY
from helpers import encode, tiny_flow

import bench
import model as model_module
from model import Attention, FlowConfig, FlowTTS, attend, rms_norm, rotary, rotate
from train_flow_tts import Config, flow_loss

TEXTS = ["A ferry.", "The captain painted seven wooden boxes.", "Eleven"]
FRAMES = torch.tensor([21, 64, 37])


def random_batch(seed=0, dtype=torch.float32, padding=0.0):
    """A training batch of TEXTS and FRAMES whose mels and noise are random, and `padding` beyond their ends."""
    torch.manual_seed(seed)
    text, length = encode(TEXTS)
    batch = {"mel": torch.randn(3, 64, 80, dtype=dtype) * 2 - 5, "noise": torch.randn(3, 64, 80, dtype=dtype)}
    for n, mel, noise in zip(FRAMES, *batch.values()):
        mel[n:] = noise[n:] = padding
    return batch | {"frames": FRAMES, "text": text, "length": length, "t": torch.tensor([0.3, 0.6, 0.9], dtype=dtype),
                    "drop": torch.tensor([False, False, True])}


def alone(batch, i):
    """The clip i of a batch, padded no further than to whole patches of two frames."""
    frames, length = int(FRAMES[i] + FRAMES[i] % 2), int(batch["length"][i])
    ends = {"mel": frames, "noise": frames, "text": length}
    return {key: value[i:i + 1, :ends[key]] if key in ends else value[i:i + 1] for key, value in batch.items()}


# ------------------------------------------------------------------------------------------------------------
# Parts

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_is_pytorchs(dtype, tolerance):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 67, dtype=torch.float64) + 1).to(dtype)
    exact = F.rms_norm(x.double(), (67,), eps=1e-6)
    assert rms_norm(x).dtype == dtype
    torch.testing.assert_close(rms_norm(x).double(), exact, atol=tolerance, rtol=tolerance)
    assert rms_norm(torch.zeros(1, 4)).isfinite().all()


def test_rotary_scores_depend_on_the_difference_of_positions():
    """Fractions of a position too, and rotation keeps lengths."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 7, 16, dtype=torch.float64)
    p, s = torch.rand(2, 1, 7, dtype=torch.float64) * 50

    def scores(shift):
        return rotate(q, rotary(p + shift, 16, 100.0)) @ rotate(k, rotary(s + shift, 16, 100.0)).mT

    torch.testing.assert_close(scores(0), scores(12.25), atol=1e-4, rtol=0)
    assert (scores(0) - q @ k.mT).abs().max() > 1
    torch.testing.assert_close(rotate(q, rotary(p, 16, 100.0)).norm(dim=-1), q.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_training_attention_is_the_fused_kernel():
    """Values and gradients, with a mask."""
    torch.manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None]
    q, k, v, up = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9, 5))
    fast, exact = attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(fast, exact)
    torch.testing.assert_close(torch.autograd.grad(fast, (q, k, v), up), torch.autograd.grad(exact, (q, k, v), up))
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, mask), exact)


def test_positional_attention_starts_on_the_diagonal():
    """With queries and keys that say nothing, each step attends most to the source at its own position."""
    torch.manual_seed(0)
    attention = Attention(64, 2, positional=True)
    for layer in (attention.query, attention.key):
        torch.nn.init.zeros_(layer.weight)
    for layer in (attention.value, attention.out):
        torch.nn.init.eye_(layer.weight)
    position = torch.arange(24.0)[None]
    source = torch.nn.functional.one_hot(torch.arange(24), 64).float()[None]
    rope = rotary(position, 32, 100.0)
    mask = torch.ones(1, 1, 1, 24, dtype=torch.bool)
    weights = attention(torch.zeros(1, 24, 64), source, rope, rope, mask)[0, :, :24]
    assert torch.equal(weights.argmax(-1), torch.arange(24)) and weights.diag().min() > 1.5 / 24


# ------------------------------------------------------------------------------------------------------------
# Padding

@pytest.mark.parametrize("padding", [0.0, 7.0])
@pytest.mark.parametrize("changes", [dict(patch=2, text_layers=1), dict(patch=1, text_layers=0),
                                     dict(prediction="mel")])
def test_a_padded_batch_is_each_clip_alone(padding, changes):
    """Velocities and durations, whatever the padding holds."""
    model, batch = tiny_flow(**changes), random_batch(padding=padding)
    names = ("noise", "t", "frames", "text", "length")
    with torch.no_grad():
        together, seconds = model(*(batch[name] for name in names))
        for i, n in enumerate(FRAMES):
            velocity, second = model(*(alone(batch, i)[name] for name in names))
            torch.testing.assert_close(together[i, :n], velocity[0, :n], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(seconds[i:i + 1], second)


@pytest.mark.parametrize("changes", [{}, dict(prediction="mel")])
def test_gradients_of_a_padded_batch_are_the_sum_of_each_alone(changes):
    model, batch = tiny_flow(**changes).train(), random_batch(padding=3.0)
    gradients = []
    for parts in ([batch], [alone(batch, i) for i in range(3)]):
        model.zero_grad()
        for part in parts:
            torch.cat(flow_loss(Config(**TINY), model, part)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), f"{name} takes no part"
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4 * gradient.abs().max(), rtol=1e-3, msg=name)


def test_activation_checkpointing_changes_no_gradient():
    model, batch = tiny_flow().train(), random_batch()
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        torch.cat(flow_loss(Config(**TINY), model, batch)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# The clock

def test_clock():
    """It rises from byte to byte and ends before the text does; with equal durations it strikes at every half."""
    model = tiny_flow()
    (_, mask, clock), seconds = model.encode_text(*encode(TEXTS))
    for row, n in zip(clock, mask.sum((1, 2, 3))):
        assert (row[:n].diff() > 0).all() and 0 < row[0] and row[n - 1] < n
    torch.nn.init.zeros_(model.encode_text.duration[-1].weight)
    torch.nn.init.constant_(model.encode_text.duration[-1].bias, -2.0)
    (_, mask, clock), seconds = model.encode_text(*encode(TEXTS))
    for row, n, second in zip(clock, mask.sum((1, 2, 3)), seconds.exp()):
        torch.testing.assert_close(row[:n], torch.arange(n) + 0.5)
        assert second.item() == pytest.approx(n.item() * 2.718281828 ** -2, rel=1e-5)


@pytest.fixture
def float64(monkeypatch):
    """All of the model in float64, those parts too that are float32 whatever the rest is."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(model_module, "rms_norm", lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_flow_loss_moves_the_clock(float64):
    """The gradient of the flow loss by the log duration of single bytes is what finite differences say, and is not
    zero: that is how alignment is learnt. All bytes slower by the same factor is the same alignment: no gradient."""
    model, batch = tiny_flow().double(), random_batch(dtype=torch.float64)
    nudge = torch.zeros(*batch["text"].shape, 1, requires_grad=True)
    model.encode_text.duration.register_forward_hook(lambda module, inputs, out: out + nudge)

    def loss():
        return flow_loss(Config(**TINY), model, batch)[0].sum()

    gradient, = torch.autograd.grad(loss(), nudge)
    largest = gradient.abs().max()
    assert largest > 1e-3
    assert (gradient.sum(1).abs() < 1e-6 * largest).all()
    for i, byte in ((0, 3), (1, 20), (2, 0)):
        assert gradient[i, byte].abs() > 1e-3 * largest
        sides = []
        for h in (1e-4, -1e-4):
            with torch.no_grad():
                nudge[i, byte] = h
                sides.append(loss())
                nudge[i, byte] = 0
        torch.testing.assert_close((sides[0] - sides[1]) / 2e-4, gradient[i, byte, 0], atol=1e-7 * largest, rtol=1e-5)
    beyond = torch.arange(nudge.shape[1]) >= batch["length"][:, None]
    assert not gradient[..., 0][beyond].any()


def test_the_loss_is_the_mean_squared_error_of_the_velocity():
    """With a model whose velocity is 0 and that thinks a byte takes 70 ms, both losses have a closed form."""
    torch.manual_seed(0)
    model, batch = FlowTTS(FlowConfig(**TINY)), random_batch()
    flow, duration = flow_loss(Config(**TINY), model, batch)
    x = (batch["mel"] + 5.5175) / 2.0644
    wanted = [(noise - mel)[:n].square().mean(-1).sum() for n, mel, noise in zip(FRAMES, x, batch["noise"])]
    torch.testing.assert_close(flow, torch.stack(wanted))
    seconds = FRAMES * 256 / 22050
    missed = (0.07 * batch["length"] / seconds).log().square()
    missed[2] = 0  # it has no text to tell its length from
    torch.testing.assert_close(duration, missed)


def test_a_model_that_predicts_mels():
    """One that always gives the clean mel has the right velocity from t = 0.2 on. Below, x_t - 0.2 v would be right,
    and what it gives is divided by 0.2 all the same."""
    model, (x, noise) = FlowTTS(FlowConfig(**TINY, prediction="mel")), torch.randn(2, 1, 64, 80)
    x = x[:, :1].expand(-1, 64, -1)  # as each frame is the same, the last bias can hold it
    with torch.no_grad():
        model.mel_output.bias.copy_(x[0, 0].repeat(model.c.patch))
        for t in (0.05, 0.2, 0.5, 1.0):
            x_t, (text, length) = (1 - t) * x + t * noise, encode(["A ferry."])
            velocity, _ = model(x_t, torch.tensor([t]), torch.tensor([64]), text, length)
            torch.testing.assert_close(velocity, (noise - x) * min(1, t / 0.2), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Sizes

def test_parameters_of_the_published_config():
    """bench.py counts what a sum over the widths gives."""
    D = E = 1024  # decoder, text
    layers, hidden, mels = 8, 4096, 80
    text = 1472 * E + (E * E + E) + (E + 1)
    block = 9 * D + 8 * D + 4 * D * D + (2 * D * D + 2 * E * D + 2 * D) + 3 * D * hidden
    rest = (256 * D + D) + (D * D + D) + (9 * D * D + 9 * D) + (mels * D + D) + (2 * D * D + 2 * D) + (mels * D + mels)
    row = bench.params_row(str(ROOT / "configs" / "flow_ljspeech.yaml"))
    assert (row["text"], row["blocks"], row["rest"]) == (text, layers * block, rest)
    assert row["trained"] == text + layers * block + rest and row["total"] == row["trained"] + row["frozen"]
    assert row["clips a step"] == 64
