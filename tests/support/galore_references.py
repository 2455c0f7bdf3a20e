"""Textbook GaLore and GoLore on one whole tensor; nothing of the package is imported.

As in `references`: `(weight, grad, state, **hyper) -> new weight`.  `state["key"]` is the
number of the parameter, which is in the seed of random bases.
"""

import functools
import zlib

import references
import torch

from support.signs import with_signs


def stiefel(size, rank, seed):
    """Uniform on the Stiefel manifold: QR of a Gaussian, with a positive diagonal of R."""
    draw = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return q * torch.sign(torch.diagonal(r))


def bases_of(matrix, rank, side, random, seed):
    """Left [R, q] and right [C, q]; the identity stands for the side that is not projected."""
    rows, columns = matrix.shape
    if random:
        left, right = stiefel(rows, rank, seed), stiefel(columns, rank, seed + 1)
    else:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        left, right = with_signs(u[:, :rank]), with_signs(vh[:rank].T)
    return left if side != "right" else torch.eye(rows).double(), right if side != "left" else torch.eye(
        columns
    ).double()


def adamw(grad, state, weight, *, lr, betas=(0.9, 0.999), eps=1e-6, correct_bias=True):
    m, v, t = references.moments(grad, state, betas)
    if correct_bias:
        lr = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
    return lr * m / (torch.sqrt(v) + eps), None


def adamw_8bit(grad, state, weight, *, lr, betas=(0.9, 0.999), eps=1e-8):
    m, v, t = references.moments(grad, state, betas)
    return lr * (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + eps), None


def sgd(grad, state, weight, *, lr, momentum=0.0, dampening=0.0, nesterov=False):
    state["t"] = state.get("t", 0) + 1
    if not momentum:
        return lr * grad, None
    state["m"] = grad if state["t"] == 1 else momentum * state["m"] + (1 - dampening) * grad
    return lr * (grad + momentum * state["m"] if nesterov else state["m"]), None


def lion(grad, state, weight, *, lr, betas=(0.9, 0.99)):
    """Decays before the step, as Lion does."""
    return -references.lion(torch.zeros_like(grad), grad, state, lr=lr, betas=betas), lr


def adafactor(
    grad, state, weight, *, lr, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, scale_parameter=True
):
    """The step size is that of the whole weight; rows, columns and root mean square are the image's."""
    state["t"] = t = state.get("t", 0) + 1
    if scale_parameter:
        lr = lr * max(eps[1], references.rms(weight).item())
    decay, squared, average = 1 - t**decay_rate, grad**2 + eps[0], references.average
    if grad.dim() >= 2:
        row, col = average(state, "row", squared.mean(-1), decay), average(state, "col", squared.mean(-2), decay)
        step = grad * references.rank_one_root(row, col)
    else:
        step = grad / torch.sqrt(average(state, "v", squared, decay))
    step = lr * step / max(1.0, references.rms(step).item() / clip_threshold)
    return (average(state, "m", step, beta1) if beta1 is not None else step), lr


def galore(
    inner, weight, grad, state, *, lr, weight_decay=0.0, rank=None, update_proj_gap=200, scale=0.25, proj_type="std",
    svd_method="exact", random_from_step=None, reproject_momentum=False, clamp=False, seed=0, **hyper,
):  # fmt: skip
    """Algorithm 2 of arXiv 2403.03507 around an inner rule; `reproject_momentum`: algorithm 1 of arXiv 2410.11289."""
    number, shape = state.setdefault("updates", 0), weight.shape
    state["updates"] += 1
    if rank is None or weight.dim() < 2:
        # Adafactor's own rule has matrices over the last two dims; it is the same for two or fewer.
        step, _lr = inner(grad, state, weight, lr=lr, **hyper)
    else:
        matrix = grad.reshape(shape[0], -1)
        rows, columns = matrix.shape
        short, long = ("right", "left") if rows >= columns else ("left", "right")
        side = {"std": short, "reverse_std": long}.get(proj_type, proj_type)
        if number % update_proj_gap == 0:
            random = svd_method == "random" or (random_from_step is not None and number >= random_from_step)
            draw = zlib.crc32(repr((seed, state["key"], number // update_proj_gap)).encode()) * 4
            old, state["bases"] = state.get("bases"), bases_of(matrix, min(rank, rows, columns), side, random, draw)
            if reproject_momentum and old is not None and "m" in state:
                state["m"] = state["bases"][0].T @ old[0] @ state["m"] @ old[1].T @ state["bases"][1]
        left, right = state["bases"]
        step, _lr = inner(left.T @ matrix @ right, state, weight, lr=lr, **hyper)
        step = scale * (left @ step @ right.T).reshape(shape)
    if _lr is not None:  # Adafactor and Lion decay first
        return weight - _lr * weight_decay * weight - step
    return (weight - step) * (1 - lr * weight_decay)


INNER = {"adamw": adamw, "adamw8bit": adamw_8bit, "sgd": sgd, "adafactor": adafactor, "lion": lion}
galore_adamw = functools.partial(galore, adamw)
galore_8bit = functools.partial(galore, adamw_8bit)
galore_sgd = functools.partial(galore, sgd)
galore_lion = functools.partial(galore, lion)


def galore_adafactor(weight, grad, state, *, relative_step=False, **hyper):
    """With `relative_step` off, as the table has it."""
    assert not relative_step
    return galore(adafactor, weight, grad, state, **hyper)
