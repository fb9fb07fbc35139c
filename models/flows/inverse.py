"""The inverse of one residual block."""

import torch
from torch import Tensor

from models.flows.errors import FlowInverseError
from models.flows.lipschitz import TWO_PI, Chain

# Iterations between two looks of the host at a batch that keeps its shape.
LOOK_EVERY = 8


def invert(
    chain: Chain,
    goal: Tensor,
    tolerance: float,
    max_iterations: int,
    number: int,
    bound: float,
    fixed_shape: bool | None = None,
) -> Tensor:
    """Solve a + g(a) = goal, (B, ...) in the angle coordinate, for block `number`, counted from the data side.

    The fixed point a <- f(a) = goal - g(a) with Anderson's acceleration of depth one (Walker & Ni 2011,
    doi:10.1137/10078356X): near the Lipschitz bound it needs a fifth of the evaluations, and it ends closer to the
    solution than its last residual tells. A point of larger residual than the best so far is dropped for the plain step
    from the best one, which shrinks the residual by Lip(g) <= `bound` < 1; so it converges as surely as the plain
    iteration. Each sample has its own steps, and leaves the work when it is done: its largest residual is at most
    `tolerance` * (1 + max|x|).

    `fixed_shape`: samples that are done stay, and the host looks only now and then whether all are; by default so
    except on a CPU, where a look costs nothing and a sample does.

    Raises FlowInverseError.
    """

    frozen = goal.device.type != "cpu" if fixed_shape is None else fixed_shape

    def size(r: Tensor) -> Tensor:
        return r.abs().flatten(1).amax(1)

    if not (finite := size(goal).isfinite()).all():
        raise FlowInverseError(
            f"inverse of residual block {number}: {(~finite).sum()} of {len(goal)} samples are not finite"
        )
    solution = torch.empty_like(goal)
    left = torch.arange(len(goal), device=goal.device)
    column = (-1,) + (1,) * (goal.ndim - 1)
    a, best_size = goal, goal.new_full((len(goal),), torch.inf)
    best_f = best_r = torch.zeros_like(goal)
    waiting = torch.ones(len(goal), dtype=torch.bool, device=goal.device)
    for iteration in range(max_iterations):
        f = goal - chain.value(a)
        r = f - a
        r_size = size(r)
        better = r_size <= best_size
        if iteration:
            change, bend = f - best_f, r - best_r
            # The secant's step to a zero of r; for a linear map of factor rho it is rho / (rho - 1), hence the limits.
            step = (r * bend).flatten(1).sum(1) / (bend * bend).flatten(1).sum(1).clamp_min(torch.finfo(r.dtype).tiny)
            following = f - step.clamp(-1 / (1 - bound), 0.5).reshape(column) * change
            keep = better.reshape(column)
            following = torch.where(keep, following, best_f)
            best_f, best_r = torch.where(keep, f, best_f), torch.where(keep, r, best_r)
            best_size = torch.where(better, r_size, best_size)
        else:
            following, best_f, best_r, best_size = f, f, r, r_size
        going = r_size > tolerance * (TWO_PI + size(a))
        a = following
        if frozen:
            solution = torch.where((waiting & ~going).reshape(column), a, solution)
            waiting = waiting & going
            if iteration % LOOK_EVERY == LOOK_EVERY - 1 and not waiting.any():
                return solution
        elif not going.all():
            solution[left[~going]] = a[~going]
            left, a, goal, best_f, best_r, best_size = (t[going] for t in (left, a, goal, best_f, best_r, best_size))
            if len(left) == 0:
                return solution
    if frozen:
        left, best_size = waiting.nonzero().flatten(), best_size[waiting]
        if len(left) == 0:
            return solution
    residual = best_size.max().item() / TWO_PI
    raise FlowInverseError(
        f"inverse of residual block {number}: {len(left)} of {len(solution)} samples not converged after "
        f"{max_iterations} iterations: largest residual {residual:.3g}, tolerance {tolerance:.3g}"
    )
