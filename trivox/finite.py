"""Steps that would spoil a model, as their loss or gradient is not finite: found without a wait for the GPU, left out
to the last bit, and told with the clips that did it."""

import math

import torch
import torch.distributed as dist
from tqdm import tqdm

from trivox.common import UserError

IN_A_ROW = 10  # so many such steps end a run


def lerp_unless(bad, x, ends, weight):
    """Move the tensors x towards their ends by a weight, in place; not at all where the tensor `bad` is 1. That is what
    PyTorch's fused SGD does with a gradient of -ends and a weight decay of 1, and the GPU need not be asked."""
    torch._fused_sgd_(x, ends, [], weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
                      maximize=True, is_first_step=False, grad_scale=None, found_inf=bad)


class Watch:
    """Over the steps of a run. `bad` is a tensor, 1 in a step that must change nothing: the optimizers, fused ones of
    PyTorch's and Muon, look at it."""

    def __init__(self, device, optimizers, scaler):
        self.bad, self.scales = torch.zeros((), device=device), scaler.is_enabled()
        self.steps, self.in_a_row, self.most, self.tried = [], 0, 0, {}
        self.spoilt = []  # clips of the validation that by themselves had no loss that is finite
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = None, self.bad

    def see(self, step, drawn, losses, norm):
        """Whether this step is finite, in all processes. drawn: what it was made of. losses (N,), norm (): of this
        process, on the device. Returns 1 where it is and 0 where not, a tensor."""
        fine = torch.stack((losses.sum(), losses.sum() + norm)).isfinite().float()
        if dist.is_initialized():
            dist.all_reduce(fine, dist.ReduceOp.MIN)
        self.bad.copy_(1 - fine[1])
        # gradients beyond float16 are no fault: the scaler finds its scale by them
        self.steps.append((step, drawn, fine[0] if self.scales else fine[1]))
        return fine[1]

    def tell(self, step, loss, name, log):
        """Say, and write into the log, which steps were left out since this was asked last, with the names of their
        clips and of those that alone have a loss that is not finite. Waits for the GPU. All processes call it.

        loss(one of what a step was drawn) is a tensor, name(one) a string; each clip is tried once in a run. log: None
        or False in all processes but the first.
        """
        for at, clips, alone in self.look(loss, name):
            if log:
                log(step, left_out_step=at, clips=clips, not_finite_alone=alone)
                tqdm.write(sentence(at, clips, alone))

    def look(self, loss, name):
        """What is told: for each step (its number, the names of its clips, those that alone are at fault)."""
        fine = torch.stack([flag for *_, flag in self.steps]).tolist() if self.steps else []
        found = [(step, drawn) for (step, drawn, _), flag in zip(self.steps, fine) if not flag]
        for flag in fine:
            self.in_a_row = 0 if flag else self.in_a_row + 1
            self.most = max(self.most, self.in_a_row)
        self.steps = []
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        found = [(step, {name(one): one for one in drawn}) for step, drawn in found]
        for _, clips in found:
            for clip in [*clips][rank::world]:
                if clip not in self.tried:
                    with torch.no_grad():
                        self.tried[clip] = bool(loss(clips[clip]).isfinite())
        if found and world > 1:
            of_all = [None] * world
            dist.all_gather_object(of_all, self.tried)
            self.tried = {clip: fine for some in of_all for clip, fine in some.items()}
        return [(step, [*clips], sorted(clip for clip in clips if not self.tried[clip])) for step, clips in found]

    def validate(self, score, clips, name):
        """score(clips), without those that by themselves have none that is finite: they go into the log as
        `val_left_out`, and new ones are said. Where no clip has one it is the model's fault, and all count. All
        processes call it.

        score(clips) has a `val_loss`, equal in all processes; name(clip) is a string.
        """
        def bad_of(clips):
            return [clip for clip in clips if not math.isfinite(score([clip])["val_loss"])]

        bad = bad_of(self.spoilt)  # each time: it may have been the model, as it was then
        found = score([clip for clip in clips if clip not in bad])
        if not math.isfinite(found["val_loss"]):
            bad += bad_of(clip for clip in clips if clip not in bad)
            if len(bad) == len(clips):
                bad = []
            elif bad:
                found = score([clip for clip in clips if clip not in bad])
        if (new := [name(clip) for clip in bad if clip not in self.spoilt]) and (
                not dist.is_initialized() or dist.get_rank() == 0):
            tqdm.write(f"the validation leaves out {some(new)}: its loss alone is not finite")
        self.spoilt = bad
        return found | ({"val_left_out": [*map(name, bad)]} if bad else {})

    def must_stop(self):
        """Whether so many steps in a row were left out, as far as has been looked."""
        return self.most >= IN_A_ROW

    def end(self, step, out_dir):
        """What a run that has been saved ends with. Raises UserError where it had to stop: what to try."""
        if not self.must_stop():
            return
        known = sorted(clip for clip, fine in self.tried.items() if not fine)
        few = 0 < len(known) <= len(self.tried) / 2  # where most clips fail, it is the model that does
        clips = f", or leave out the clips {', '.join(known[:10])}" if few else ""
        raise UserError(f"{self.most} steps in a row had losses or gradients that are not finite, and changed nothing; "
                        f"{out_dir} is saved as of step {step}, without them. Try a smaller --lr, or --dtype float32"
                        f"{clips}")


def some(names):
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sentence(step, clips, culprits):
    """What is said of a step that was left out."""
    alone = f"by themselves {', '.join(culprits)}" if culprits else "none of them by itself"
    return f"step {step}: its loss or gradient is not finite, so it changes nothing; its clips: {some(clips)}; {alone}"
