"""Textbook optimizers on one whole tensor, in the order of the papers' lines; nothing of the package is imported.

Each is a function `(weight, grad, state, **hyper) -> new weight`; `state` is an empty dict before the first update.
"""

import torch


def moments(grad, state, betas):
    """m_t and v_t (arXiv 1412.6980, algorithm 1) and the number t of this update."""
    beta1, beta2 = betas
    state["t"] = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", torch.zeros_like(grad)) + (1 - beta1) * grad
    state["v"] = beta2 * state.get("v", torch.zeros_like(grad)) + (1 - beta2) * grad**2
    return state["m"], state["v"], state["t"]


def adamw(weight, grad, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """Algorithm 2 of arXiv 1711.05101, with the decay scaled by lr as in torch."""
    m, v, t = moments(grad, state, betas)
    m_hat = m / (1 - betas[0] ** t)
    v_hat = v / (1 - betas[1] ** t)
    return weight - lr * weight_decay * weight - lr * m_hat / (torch.sqrt(v_hat) + eps)


def lamb(weight, grad, state, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, bias_correction=True, adam=False):
    """Algorithm 2 of arXiv 1904.00962 with phi the identity; a trust ratio with a norm of zero is one."""
    m, v, t = moments(grad, state, betas)
    if bias_correction is True:
        m = m / (1 - betas[0] ** t)
        v = v / (1 - betas[1] ** t)
    if bias_correction == "step_size":
        lr = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
    r = m / (torch.sqrt(v) + eps)
    direction = r + weight_decay * weight
    weight_norm = torch.sqrt(torch.sum(weight**2)).item()
    direction_norm = torch.sqrt(torch.sum(direction**2)).item()
    ratio = weight_norm / direction_norm if weight_norm > 0 and direction_norm > 0 and not adam else 1.0
    return weight - lr * ratio * direction
