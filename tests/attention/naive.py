"""The mechanism in float64 NumPy with plain loops, written from the equations alone."""

import numpy as np


def convolve(z: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Grouped stride-1 convolution, zero padding: `[B, H, W, C]`, `[k, k, C / G, C]` -> `[B, H, W, C]`."""
    batch, height, width, channels = z.shape
    size, _, group_size, _ = kernel.shape
    radius = size // 2
    padded = np.zeros((batch, height + 2 * radius, width + 2 * radius, channels))
    padded[:, radius : radius + height, radius : radius + width] = z
    out = np.zeros_like(z, dtype=np.float64)
    for o in range(channels):
        first = o // group_size * group_size
        for i in range(group_size):
            for u in range(size):
                for v in range(size):
                    out[..., o] += kernel[u, v, i, o] * padded[:, u : u + height, v : v + width, first + i]
    return out


def pool(x: np.ndarray, bins) -> np.ndarray:
    """Adaptive average pooling: `[B, H, W, C]` -> `[B, cells, C]`."""
    _, height, width, _ = x.shape
    cells = []
    for j in bins:
        for a in range(j):
            for b in range(j):
                rows = slice(int(np.floor(a * height / j)), int(np.ceil((a + 1) * height / j)))
                columns = slice(int(np.floor(b * width / j)), int(np.ceil((b + 1) * width / j)))
                cells.append(x[:, rows, columns].mean(axis=(1, 2)))
    return np.stack(cells, axis=1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def hga(x: np.ndarray, params: dict, bins=(1, 2, 4), excitation="shared", restore="gate", norm=None, act=None):
    """The whole mechanism; `params` as the module holds them, `norm(scale, y)` and `act(y)` optional."""
    z = x @ params["reduce"]["kernel"] if "reduce" in params else x
    kernels = params.get("mfe", {})
    names = sorted((k for k in kernels if k.startswith("kernel_")), key=lambda k: int(k.split("_")[1]))
    scales = []
    for name in names:
        y = convolve(z, kernels[name])
        y = norm(name, y) if norm else y
        scales.append(act(y) if act else y)
    cells = np.stack([pool(s, bins) for s in scales or [z]], axis=1)  # [B, S, cells, C]
    if "ee" in params:
        suppress, excite = params["ee"]["suppress"], params["ee"]["excite"]
        hidden = (
            np.einsum("bsnc,nch->bh", cells, suppress)
            if excitation == "shared"
            else np.einsum("bsnc,snch->bh", cells, suppress)
        )
        e = np.maximum(hidden, 0) @ excite
    else:
        e = cells.mean(axis=(1, 2))
    if "restore" in params and restore == "features":
        return (z * sigmoid(e)[:, None, None]) @ params["restore"]["kernel"]
    if "restore" in params:
        e = e @ params["restore"]["kernel"]
    return x * sigmoid(e)[:, None, None]
