"""q(h|x): a small residual network with batch normalisation that sees an image and describes a Gaussian.

Layers and sizes of the encoder with which INDM (Na et al. 2022, arXiv:2205.13699) conditions its flow, itself that of
Ma et al. 2021 (arXiv:2004.11820).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


class BatchNorm(nn.Module):
    """Batch normalisation of (B, C, H, W), the same on any number of processes.

    In training the statistics are those of the global batch: inside a DDP forward pass, and only there, the processes
    share their sums. The running ones, for evaluation, move by `momentum` at each pass that records a graph, so that a
    step which looks at the latents twice counts once (published: twice, and each device its own share of the batch).
    They are buffers, and so copied, not averaged: averaged weights (EMA) are evaluated with the statistics that the
    live weights had on the last batches.

    PyTorch's SyncBatchNorm refuses a CPU, and would share outside DDP's forward pass too and count every pass.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> its normalised values. ValueError in training on a single value a channel."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        running = (self.running_mean, self.running_var) if torch.is_grad_enabled() else (None, None)
        processes = processes_in_step()
        if processes == 1:
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        return self._shared(x.float() if x.dtype == torch.bfloat16 else x, processes).to(x.dtype)

    def _shared(self, x: Tensor, processes: int) -> Tensor:
        # processes have equal shares of the batch; deviations are summed about the common mean, which loses no digits
        mean = total(x.mean((0, 2, 3))) / processes
        centred = x - mean.view(1, -1, 1, 1)
        variance = total(centred.square().mean((0, 2, 3))) / processes
        if torch.is_grad_enabled():
            count = processes * x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance.to(self.running_var.dtype) * (count / (count - 1))
                self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1))


class _Total(torch.autograd.Function):
    """A sum over processes; each process's value enters every process's loss, so that gradients are summed too."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Total.apply(grad)


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, differentiable; every process must call it."""
    return _Total.apply(value)


def processes_in_step() -> int:
    """How many processes run this forward pass together: those of the DDP module around it, otherwise one.

    What a process computes on its own, such as an evaluation, must not wait for the others.
    """
    if DistributedDataParallel._get_active_ddp_module() is None:
        return 1
    return torch.distributed.get_world_size()


class EncoderBlock(nn.Module):
    """elu(x' + norm(conv(elu(norm(conv(x)))))), 3x3 convolutions; x' is x, or norm(conv1x1(x)) if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm3 = None if same else BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # neither a normalisation nor a sum needs what it has put out, and ELU's slope is seen in its own values
        h = self.norm2(self.conv2(F.elu(self.norm1(self.conv1(x)), inplace=True)))
        return F.elu(h.add_(x if self.shortcut is None else self.norm3(self.shortcut(x))), inplace=True)


class WeightNormLinear(nn.Module):
    """y = g v / |v| x + b with a norm for each output (Salimans & Kingma 2016, arXiv:1602.07868).

    v ~ N(0, 0.05^2), b = 0 and g = |v| when fresh: no pass over data sets them.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(0.05 * torch.randn(outputs, inputs))
        self.gain = nn.Parameter(self.direction.detach().norm(dim=1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        scale = self.gain / self.direction.norm(dim=1)
        return F.linear(x, self.direction * scale.unsqueeze(1), self.bias)


class Encoder(nn.Module):
    """Image (B, C, H, W) -> features (B, `size`): for each width a block and one that halves the image, then a 1x1."""

    def __init__(self, shape: Sequence[int], widths: Sequence[int], channels: int) -> None:
        super().__init__()
        here, height, width = shape
        blocks: list[nn.Module] = []
        for out in widths:
            blocks += [EncoderBlock(here, out, 1), EncoderBlock(out, out, 2)]
            here, height, width = out, -(-height // 2), -(-width // 2)
        self.blocks = nn.Sequential(*blocks)
        self.top = nn.Conv2d(here, channels, 1)
        self.size = channels * height * width

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # the faster layout by a sixth
        return F.elu(self.top(self.blocks(x))).flatten(1)
