"""Tensors, arrays and lists -> checked NumPy arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Numbers = ArrayLike | torch.Tensor


def as_array(numbers: Numbers) -> Array:
    """Return numbers as a NumPy array on the CPU, bfloat16 as float32; nothing is checked."""
    if isinstance(numbers, torch.Tensor):
        tensor = numbers.detach().cpu()  # NumPy has no bfloat16
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(numbers)


def finite(numbers: Numbers, name: str) -> Array:
    """Return numbers as an array of at least float32; a ValueError counts NaN and infinity."""
    array = as_array(numbers)
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise ValueError(
            f"{name} has type {array.dtype}; expected numbers of one shape; convert them"
        )
    array = array.astype(np.promote_types(array.dtype, np.float32), copy=False)
    bad_count = int((~np.isfinite(array)).sum())
    if bad_count:
        raise ValueError(
            f"{name} has {bad_count} non-finite numbers; expected finite ones; find the input that "
            "gives NaN or infinity, they are never ranked"
        )
    return array


def finite_matrix(numbers: Numbers, name: str) -> Array:
    """Return finite numbers (N, M) with M > 0; a ValueError says what else they are."""
    array = finite(numbers, name)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"{name} has shape {array.shape}; expected 2 dimensions; reshape it")
    return array
