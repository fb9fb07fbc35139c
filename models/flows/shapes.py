"""What flows have in common: checks of their sizes, and the three layers of a block's or a coupling's network."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.options import require


def check_levels(shape: Sequence[int], key: str, counts: Sequence[int], squeezes: int) -> None:
    """ValueError unless `counts` (option `key`) can be the levels for `shape`, which is squeezed so often in all."""
    sizes, counts = list(shape), list(counts)
    require(len(sizes) in (1, 3) and min(sizes) > 0, "shape", sizes, "is [D] or [C, H, W], positive integers")
    require(len(counts) > 0 and min(counts) > 0, key, counts, "is one or more positive integers")
    require(len(counts) == 1 or len(sizes) == 3, key, counts, "is a single count for vectors (shape [D])")
    factor = 2**squeezes
    require(
        len(sizes) == 1 or all(size % factor == 0 for size in sizes[1:]),
        "shape",
        sizes,
        f"is [C, H, W], H and W divisible by {factor}, to be squeezed {squeezes} times ({key} = {counts})",
    )


def check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless x is (B, *shape)."""
    require(tuple(x.shape[1:]) == shape, "x.shape", list(x.shape), f"is (B, {', '.join(map(str, shape))})")


def three_layers(inputs: int, hidden: int, outputs: int, image: bool) -> nn.ModuleList:
    """Convolutions 3x3, 1x1, 3x3 for images, linear maps for vectors, with PyTorch's initialisation."""
    sizes = ((inputs, hidden, 3), (hidden, hidden, 1), (hidden, outputs, 3))
    return nn.ModuleList(
        nn.Conv2d(i, o, kernel, padding=kernel // 2) if image else nn.Linear(i, o) for i, o, kernel in sizes
    )
