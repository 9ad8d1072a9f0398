"""Vectors in the form a caller asks for: unit length, fewer numbers, fewer bits, tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twn_rl.inference.options import EncodeOptions, Precision


def normalize_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return unit rows; rows of zeros stay zeros.

    >>> normalize_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def quantize(vectors: NDArray[np.float32], precision: Precision | None) -> NDArray[Any]:
    """Return vectors (N, D) in fewer bits; each depends on itself alone, never on the others.

    "int8" scales each vector's largest number to 127, which cosine similarity does not notice, and
    "uint8" adds 128 to that. "ubinary" packs the signs, eight to a byte (D/8), and "binary" is the
    same shifted by -128, as in sentence-transformers: compare these by Hamming distance.

    >>> quantize(np.array([[0.5, -1.0, 0.0]], np.float32), "int8").tolist()
    [[64, -127, 0]]
    >>> quantize(np.array([[1, -1, 1, 1, -1, -1, -1, 1]], np.float32), "ubinary").tolist()
    [[177]]
    """
    if precision in (None, "float32"):
        return vectors
    if precision in ("int8", "uint8"):
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        scaled = np.rint(127 * (vectors / np.where(largest > 0, largest, 1)))
        return scaled.astype(np.int8) if precision == "int8" else (scaled + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=1)
    return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def in_form(
    states: NDArray[np.float32],
    options: EncodeOptions,
    *,
    is_single: bool = False,
    device: torch.device,
) -> Any:
    """Return vectors in the form the caller asked for.

    Args:
        states: (N, D), not normalised; rows of zeros belong to skipped inputs.
        options: The caller's wishes.
        is_single: Return the one row as a vector.
        device: Where tensors go.
    """
    vectors = states[:, : options.truncate_dim]
    vectors = normalize_rows(vectors) if options.normalize_embeddings else vectors
    rows = np.ascontiguousarray(quantize(vectors, options.precision))
    return as_asked(rows, options, is_single=is_single, device=device)


def as_asked(
    rows: NDArray[Any], options: EncodeOptions, *, is_single: bool = False, device: torch.device
) -> Any:
    """Return finished rows as an array, a tensor, a list of tensors, or the one row there is."""
    if options.convert_to_tensor or not options.convert_to_numpy:
        tensor = torch.from_numpy(rows).to(device)
        if is_single:
            return tensor[0]
        return tensor if options.convert_to_tensor else list(tensor)
    return rows[0] if is_single else rows


def as_float_rows(vectors: Any) -> Tensor:
    """Return vectors (N, D) or one vector (D,) of any of the returned forms as a float32 tensor.

    Raises:
        TypeError: For quantised vectors, whose comparison depends on their form.
    """
    if isinstance(vectors, list | tuple) and len(vectors) and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    tensor = vectors if isinstance(vectors, Tensor) else torch.as_tensor(np.asarray(vectors))
    if not tensor.is_floating_point() and tensor.numel():
        raise TypeError(
            f"embeddings of type {tensor.dtype}; expected floating point; quantised vectors are "
            "for indexes, encode with precision='float32' to compare here"
        )
    return tensor.float() if tensor.ndim > 1 else tensor.float()[None]
