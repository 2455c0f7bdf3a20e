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


def sgd(weight, grad, state, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, decoupled=False):
    """torch.optim.SGD; decoupled, the new weight decays instead, which no momentum remembers."""
    state["t"] = state.get("t", 0) + 1
    direction = grad = grad if decoupled else grad + weight_decay * weight
    if momentum:
        state["m"] = grad if state["t"] == 1 else momentum * state["m"] + (1 - dampening) * grad
        direction = grad + momentum * state["m"] if nesterov else state["m"]
    return (weight - lr * direction) * (1 - lr * weight_decay if decoupled else 1)


def lion(weight, grad, state, *, lr, betas=(0.9, 0.99), weight_decay=0.0):
    """Algorithm 2 of arXiv 2302.06675."""
    m = state.get("m", torch.zeros_like(grad))
    update = torch.sign(betas[0] * m + (1 - betas[0]) * grad)
    state["m"] = betas[1] * m + (1 - betas[1]) * grad
    return weight - lr * weight_decay * weight - lr * update


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


def rms(x):
    return torch.sqrt(torch.mean(x**2))


def rank_one_root(row, col):
    """1 / sqrt(R C / mean(R)) of a batch of matrices (arXiv 1804.04235, equation 4)."""
    return torch.rsqrt(row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None])


def average(state, name, value, decay):
    state[name] = decay * state.get(name, torch.zeros_like(value)) + (1 - decay) * value
    return state[name]


def adafactor(
    weight, grad, state, *, lr, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, weight_decay=0.0,
    scale_parameter=True, relative_step=True, warmup_init=False,
):  # fmt: skip
    """Algorithms 4 (matrices) and 5 (vectors) of arXiv 1804.04235 with the options of section 9."""
    state["t"] = t = state.get("t", 0) + 1
    if relative_step:
        lr = min(1e-6 * t if warmup_init else 1e-2, 1 / t**0.5)
    if scale_parameter:
        lr = lr * max(eps[1], rms(weight).item())
    decay, squared = 1 - t**decay_rate, grad**2 + eps[0]
    if grad.dim() >= 2:
        update = grad * rank_one_root(
            average(state, "row", squared.mean(-1), decay), average(state, "col", squared.mean(-2), decay)
        )
    else:
        update = grad / torch.sqrt(average(state, "v", squared, decay))
    update = lr * update / max(1.0, rms(update).item() / clip_threshold)
    if beta1 is not None:
        update = average(state, "m", update, beta1)
    return weight - lr * weight_decay * weight - update


def came(
    weight, grad, state, *, lr, eps=(1e-30, 1e-16), clip_threshold=1.0, betas=(0.9, 0.999, 0.9999), weight_decay=0.0
):
    """Algorithm 2 of arXiv 2307.02047; vectors as in the authors' code, without confidence."""
    squared = grad**2 + eps[0]
    if grad.dim() >= 2:
        update = grad * rank_one_root(
            average(state, "row", squared.mean(-1), betas[1]), average(state, "col", squared.mean(-2), betas[1])
        )
    else:
        update = grad / torch.sqrt(average(state, "v", squared, betas[1]))
    update = update / max(1.0, rms(update).item() / clip_threshold)
    m = average(state, "m", update, betas[0])
    if grad.dim() >= 2:
        instability = (update - m) ** 2 + eps[1]
        m = m * rank_one_root(
            average(state, "s_row", instability.mean(-1), betas[2]),
            average(state, "s_col", instability.mean(-2), betas[2]),
        )
    return weight - lr * weight_decay * weight - lr * m
