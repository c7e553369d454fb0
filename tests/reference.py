"""Naive float64 references and helpers that several tests share; written from the papers, with loops."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns float64 noise."""
    return np.random.RandomState(seed).standard_normal(shape)


def perturbed(variables: dict) -> dict:
    """Returns the variables with noise from each one's path, so that none keeps a neutral 0 or 1."""

    def noisy(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        value = np.asarray(leaf, np.float64) + 0.3 * noise
        return jnp.asarray(np.abs(value) + 0.1 if name.endswith("['var']") else value, jnp.float32)

    return jax.tree_util.tree_map_with_path(noisy, dict(variables))


def float64(tree: dict) -> dict:
    """Returns a tree of float64 NumPy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def dense(x: np.ndarray, layer: dict) -> np.ndarray:
    return x @ layer["kernel"] + layer.get("bias", 0)


def batch_norm(x: np.ndarray, params: dict, statistics: dict, epsilon: float = 1e-5) -> np.ndarray:
    """Inference: the running statistics."""
    normed = (x - statistics["mean"]) / np.sqrt(statistics["var"] + epsilon)
    return normed * params["scale"] + params["bias"]


def convolution(x, kernel, stride=1, dilation=1, margin=0, groups=1) -> np.ndarray:
    """Grouped convolution, position by position: `[B, H, W, D]`, `[k, k, D / groups, C]` -> `[B, h, w, C]`."""
    batch, height, width, channels = x.shape
    rows, columns, depth, outputs = kernel.shape
    padded = np.zeros((batch, height + 2 * margin, width + 2 * margin, channels))
    padded[:, margin : margin + height, margin : margin + width] = x
    h = (padded.shape[1] - dilation * (rows - 1) - 1) // stride + 1
    w = (padded.shape[2] - dilation * (columns - 1) - 1) // stride + 1
    y = np.zeros((batch, h, w, outputs))
    for i in range(h):
        for j in range(w):
            for u in range(rows):
                for v in range(columns):
                    pixel = padded[:, i * stride + u * dilation, j * stride + v * dilation]
                    for c in range(outputs):
                        group = c // (outputs // groups)
                        y[:, i, j, c] += pixel[:, group * depth : (group + 1) * depth] @ kernel[u, v, :, c]
    return y


def relative_error(ours, reference) -> float:
    ours = np.asarray(ours, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def applied(module, x: np.ndarray) -> tuple[np.ndarray, dict, dict]:
    """Applies a module in inference, its variables made from their names: output, float64 params and batch_stats."""
    x = jnp.asarray(x, jnp.float32)
    shapes = dict(jax.eval_shape(module.init, jax.random.key(0), x))  # initialising would take longer than the test
    variables = perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    values = float64(variables)
    return np.asarray(jax.jit(module.apply)(variables, x)), values["params"], values.get("batch_stats", {})


def parameter_count(module, shape: tuple[int, ...]) -> int:
    """Counts a module's parameters without computing anything."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
