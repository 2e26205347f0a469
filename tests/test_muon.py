"""muon.py against the singular value decomposition and against PyTorch's own, in both precisions that "auto" may be."""

import pytest
import torch
from conftest import chip, finish, launch

from model import CodecConfig, CodecLM
from trivox.muon import Muon, orthogonalise


@pytest.fixture(params=["float32", "bfloat16"], autouse=True)
def dtype(request, monkeypatch):
    """The precision in which matrices are multiplied here."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", chip(request.param))
    return request.param


@pytest.mark.parametrize("shape", [(32, 32), (3, 48, 20), (2, 20, 48)], ids=str)
def test_orthogonalise(shape, dtype):
    """Singular vectors stay, singular values from 1 down to 1/20 become about 1; matrices of a stack do not mix. The 8
    bits of bfloat16 are worth 0.02 of the largest value after five iterations."""
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    G = U * torch.linspace(1, 0.05, S.shape[-1], dtype=torch.float64) @ Vh
    X = orthogonalise(G.float()).double()
    turned = U.mT @ X @ Vh.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.25
    noise = 0.02 if dtype == "bfloat16" else 1e-4
    assert (turned - torch.diag_embed(values)).abs().max() < 2 * noise and X.shape == G.shape
    if len(shape) == 3:
        torch.testing.assert_close(orthogonalise(G[1].float()).double(), X[1], atol=noise, rtol=0)


def test_steps_are_pytorchs():
    """Ten steps on matrices of two shapes beside torch.optim.Muon, which multiplies in bfloat16: no farther apart than
    that is from float32. Momenta, which are not multiplied, are equal."""
    torch.manual_seed(0)
    first = [torch.randn(shape) for shape in ((16, 40), (24, 24), (16, 40))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in first] for _ in range(2))
    a = Muon(ours, 0.02, weight_decay=0.5)
    b = torch.optim.Muon(theirs, 0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")

    def step(seed):
        torch.manual_seed(seed)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()

    for seed in range(10):
        step(seed)
    for p, q, start in zip(ours, theirs, first):
        assert (p - q).norm() < 0.02 * (p - start).norm()
    state_a, state_b = a.state_dict()["state"], b.state_dict()["state"]
    for i in state_a:
        torch.testing.assert_close(state_a[i]["momentum_buffer"], state_b[i]["momentum_buffer"])


SHAPES = (16, 40), (24, 24), (16, 40), (16, 40), (56, 20)


def steps(weights, count=10):
    """So many steps of Muon on matrices, whose gradients are the same in all processes."""
    optimizer, generator = Muon(weights, 0.02, weight_decay=0.5), torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return weights, optimizer


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def one_of_several(rank, world, folder, dtype):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.cpu.get_capabilities = chip(dtype)
    torch.save([p.detach() for p in steps(matrices())[0]], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_the_work(dtype, tmp_path, world=3):
    """Also where there are fewer matrices of a shape than processes, or a number that they do not divide."""
    started = [launch(one_of_several, rank, world, tmp_path, dtype) for rank in range(world)]
    alone = steps(matrices())[0]
    assert [finish(process) for process in started] == [(0, "")] * world
    for rank in range(world):
        for p, q in zip(alone, torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(q, p.detach(), atol=1e-6, rtol=0)


def test_parts_are_matrices_of_their_own():
    """q, k and v in one matrix learn as three matrices do, and their momentum is kept as one."""
    whole, apart = matrices()[-1:], [torch.nn.Parameter(p.clone()) for p in matrices()[-1].split([30, 10, 16])]
    whole[0].parts = [30, 10, 16]
    generator = torch.Generator().manual_seed(1)
    optimizers = [Muon(some, 0.02) for some in (whole, apart)]
    for _ in range(5):
        whole[0].grad = torch.randn(56, 20, generator=generator)
        for p, grad in zip(apart, whole[0].grad.split(whole[0].parts)):
            p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole[0], torch.cat(apart))
    momenta = [state["momentum_buffer"] for state in optimizers[1].state_dict()["state"].values()]
    assert torch.equal(optimizers[0].state_dict()["state"][0]["momentum_buffer"], torch.cat(momenta))


def test_models_say_where_their_matrices_are_joined():
    """Also after they have been moved, and no row is left over."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CodecLM(CodecConfig(width=64, layers=4, heads=2, kv_heads=1, pattern="AGDM")).double()
    joined = {name: p.parts for name, p in model.named_parameters() if hasattr(p, "parts")}
    assert joined == {"blocks.0.mixer.input.weight": [64, 32, 32],
                      "blocks.1.mixer.input.weight": [48, 48, 96, 96, 2, 2],
                      "blocks.2.mixer.input.weight": [64, 64, 64], "blocks.2.mixer.gates.weight": [2, 2],
                      "blocks.3.mixer.input.weight": [128, 128, 128, 128, 2]}
    assert all(sum(parts) == len(model.get_parameter(name)) for name, parts in joined.items())
