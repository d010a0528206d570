"""Named static buffers: the tensors whose addresses a captured graph keeps, each with one owner.

What belongs together (keys and values of every layer, a cache) is a *tree*: a tensor, or a list, tuple or
dataclass of trees; anything else in it (None, a number) is a constant that is carried along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_tensors(function: Callable[[str, Tensor], Any], tree: Any, name: str = "") -> Any:
    """The tree with `function(path, tensor)` in every tensor's place; the path of `tree.context[0]` in a
    tree called "session" is "session.context.0"."""
    if isinstance(tree, Tensor):
        return function(name, tree)
    if isinstance(tree, list | tuple):
        mapped = [map_tensors(function, item, f"{name}.{i}") for i, item in enumerate(tree)]
        if hasattr(tree, "_fields"):  # a named tuple
            return type(tree)(*mapped)
        return mapped if isinstance(tree, list) else tuple(mapped)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [field.name for field in dataclasses.fields(tree)]
        parts = {field: map_tensors(function, getattr(tree, field), f"{name}.{field}") for field in fields}
        return dataclasses.replace(tree, **parts)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of the tree, in order."""
    found: list[Tensor] = []
    map_tensors(lambda _, tensor: found.append(tensor), tree)
    return found


def layout(tree: Any) -> Any:
    """What two trees must agree on for one to be copied into the other: the tree with a (shape, dtype) in
    every tensor's place, to be compared with ==."""
    return map_tensors(lambda _, tensor: (tensor.shape, tensor.dtype), tree)


def copy_tree(into: Any, tree: Any) -> None:
    """Copy every tensor of `tree` into its counterpart in `into`, converting dtypes.

    Launches copies and nothing else, so it can be captured.  Raises ValueError when the trees do not have
    the same number of tensors or a pair differs in shape (a copy would broadcast it silently).
    """
    for target, source in zip(tensors(into), tensors(tree), strict=True):
        if target.shape != source.shape:
            raise ValueError(f"cannot copy {list(source.shape)} into a buffer of {list(target.shape)}")
        target.copy_(source)


class Buffers:
    """Static buffers on one device, by name; a name is allocated once.

    The owner keeps them until `close`; whatever was captured over them must be destroyed before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def zeros(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new contiguous buffer, zero.  Raises ValueError for a name that is taken."""
        return self._own(name, torch.zeros(tuple(shape), dtype=dtype, device=self.device))

    def like(self, name: str, tree: T) -> T:
        """New zero buffers of the shapes, dtypes and memory layouts of `tree`, named `name` + path."""
        result: T = map_tensors(
            lambda path, tensor: self._own(path, torch.zeros_like(tensor, device=self.device)), tree, name
        )
        return result

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def poison(self) -> None:
        """Fill every buffer with NaN (integers: their largest value): a test's way to show that nothing is
        read before it is written."""
        for buffer in self._buffers.values():
            if buffer.dtype.is_floating_point:
                buffer.fill_(float("nan"))
            elif buffer.dtype != torch.bool:
                buffer.fill_(torch.iinfo(buffer.dtype).max)

    def close(self) -> None:
        """Let go of every buffer."""
        self._buffers.clear()

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._buffers:
            raise ValueError(f"buffer {name!r} exists already; every buffer has one owner")
        self._buffers[name] = tensor
        return tensor
