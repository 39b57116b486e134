"""A list of modules that says what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Stack(nn.Module, Generic[M]):
    """An ordered list of modules of one type. `nn.ModuleList` hands out bare `Module`s, which hide misspelt methods."""

    def __init__(self, modules: Iterable[M]) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def __iter__(self) -> Iterator[M]:
        return cast("Iterator[M]", iter(self._modules.values()))

    def __getitem__(self, i: int) -> M:
        return cast("M", self._modules[str(i)])

    def __len__(self) -> int:
        return len(self._modules)
