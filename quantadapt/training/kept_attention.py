"""What attention returned in a layer that is recomputed, kept for its recomputation.

Of a long row attention is most of a layer's time, and what it returns is about as large as the
layer's input. So it is not computed again: the recomputation is given what the fused kernel
returned, and its backward goes on from there. It is selective recomputation
(https://arxiv.org/abs/2205.05198) of all but one operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = {
    f"aten::_scaled_dot_product_{name}"
    for name in (
        *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
        "fused_attention_overrideable",
    )
}
"""What torch's `scaled_dot_product_attention` calls its fused kernels. What it makes of products
itself is computed again."""

Layer = Callable[..., Any]


class Stored(Protocol):
    """A tensor that was put away."""

    def fetched(self) -> Tensor:
        """Return it as it was, once."""


class InPlace:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def fetched(self) -> Tensor:
        """Return it."""
        return self.tensor


class KeptAttention:
    """Lets layers run twice, where the second run takes attention from the first."""

    def __init__(self) -> None:
        self._mode: TorchDispatchMode | None = None

    def again(self, layer: Layer, store: Callable[[Tensor], Stored]) -> Layer:
        """Return `layer` that keeps what attention returns the first time it runs, and takes it
        from there the second time.

        Args:
            store: puts a tensor away, which is contiguous.
        """
        tape: deque[_Returned] = deque()
        first = iter([_Record(tape, store)])
        return partial(self._run, lambda: next(first, None) or _Replay(tape), layer)

    def _run(self, mode: Callable[[], TorchDispatchMode], layer: Layer, *args: Any) -> Any:
        before, self._mode = self._mode, mode()
        try:
            return layer(*args)
        finally:
            self._mode = before

    @contextmanager
    def around_kernel(self) -> Iterator[None]:
        """Inside a kernel is called, and nothing else."""
        if self._mode is None:
            yield
            return
        with self._mode:
            yield


class _Returned:
    """What a kernel returned: tensors that grow with the row are put away."""

    def __init__(self, kernel: Any, found: Any, store: Callable[[Tensor], Stored]) -> None:
        self.kernel = kernel
        self.parts = [_PutAway(part, store) if _grows(part) else part for part in found]

    def fetched(self) -> tuple[Any, ...]:
        return tuple(p.fetched() if isinstance(p, _PutAway) else p for p in self.parts)


def _grows(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() > 1 and part.numel() > 0


class _PutAway:
    """A tensor that is put away as it lies in memory, and comes back with its own strides."""

    def __init__(self, tensor: Tensor, store: Callable[[Tensor], Stored]) -> None:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        self.stored = store(tensor.detach().permute(order))
        self.inverse = [order.index(dim) for dim in range(len(order))]

    def fetched(self) -> Tensor:
        return self.stored.fetched().permute(self.inverse)


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: deque[_Returned], store: Callable[[Tensor], Stored]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.store = tape, store

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.name() in KERNELS:
            self.tape.append(_Returned(function, found, self.store))
        return found


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: deque[_Returned]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.tape and self.tape[0].kernel is function:
            return self.tape.popleft().fetched()
        return function(*args, **(kwargs or {}))
