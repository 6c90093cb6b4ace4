"""Checks of arguments, one for each kind of value, and whether autograd records a call with any."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["flag", "integer", "needs_grad", "number", "tensor", "token", "tokens"]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int: Python's, NumPy's or a tensor's with a single element; no bool.

    Raises:
        TypeError: no integer.
        ValueError: below ``low`` or above ``high``.
    """
    found = _index(value)
    if found is None:
        raise TypeError(f"{name}: expected an integer, got {_short(value)}")
    if found < low or (high is not None and found > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {allowed}, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    """The value, which must be True or False.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_short(value)}")
    return value


def number(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: no real number.
        ValueError: infinite or NaN, in float32.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {_short(value)}")
    if not abs(float(value)) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def tensor(name: str, value: Any) -> Tensor:
    """The value, which must be a tensor.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def token(name: str, value: Any, vocab_size: int) -> int:
    """The value as the id of a token.

    Raises:
        TypeError: no integer.
        IndexError: not in the vocabulary.
    """
    found = _index(value)
    if found is None:
        raise TypeError(f"{name}: expected integer token ids, got {_short(value)}")
    if not 0 <= found < vocab_size:
        raise IndexError(f"{name}: expected tokens from 0 to {vocab_size - 1}, got {found}")
    return found


def tokens(name: str, values: Any, vocab_size: int) -> set[int]:
    """The values as ids of tokens.

    Raises:
        TypeError: no collection of integers.
        IndexError: one that is not in the vocabulary.
    """
    alone = getattr(values, "ndim", 1) == 0  # one number as a tensor or array
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or alone:
        raise TypeError(f"{name}: expected a collection of token ids, got {_short(values)}")
    return {token(name, value, vocab_size) for value in values}


def _index(value: Any) -> int | None:
    """The integer, or None for anything else, bools included."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
