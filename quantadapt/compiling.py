"""Plain functions of tensors as one kernel each, while a model trains or answers on CUDA.

In eager mode each operation of a `dequantize` goes through the whole weight. Inductor makes one
pass of it, for some formats faster than the vendor's kernel. Compiling takes a second or two for
each shape, so it is started in training only, and for weights that are large enough to gain by it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import SlowerWarning, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

LEAST_BYTES = 2**19
"""Packed weights below this size are left to eager mode: starting a kernel costs more."""

_active = False
"""While a model trains: backward runs in threads of autograd's, so this is for all threads."""
_wanted = threading.local()
_kernels: dict[Any, Callable[..., Any] | None] = {}
_refused: set[Any] = set()
"""Kernels of Triton's that could not be made, and where."""


@cache
def has_triton() -> bool:
    """Say whether Triton is installed, as it is with CUDA builds of torch."""
    return find_spec("triton") is not None


def on_its_device(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Have Triton's kernels in `function` run where its first tensor is: Triton takes the current
    GPU, which may be another."""

    @wraps(function)
    def launched(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        import torch

        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(*args, **kwargs)

    return launched


@contextmanager
def compiled_functions() -> Iterator[None]:
    """Inside, `one_kernel` compiles where that pays."""
    global _active
    before, _active = _active, has_triton()
    try:
        yield
    finally:
        _active = before


@contextmanager
def results_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a kernel of `one_kernel` also casts to `dtype` and lays the result out row by row:
    afterwards, that would be another pass through the weight. Eager mode leaves it to the caller.
    """
    before = _dtype()
    _wanted.dtype = dtype
    try:
        yield
    finally:
        _wanted.dtype = before


def _dtype() -> torch.dtype | None:
    """Return what `results_in` says in this thread."""
    found: torch.dtype | None = getattr(_wanted, "dtype", None)
    return found


def one_kernel(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    static: tuple[Any, ...] = (),
    otherwise: Callable[[], Tensor] | None = None,
    written: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return function(*tensors, *static), computed by one kernel where that pays.

    Args:
        function: of tensors, in plain torch, without side effects; of a module, not a closure.
        tensors: the packed weight first. Bit for bit the result is that of eager mode.
        static: hashable; a kernel is made for each combination of these and of the shapes.
        otherwise: the vendor's own way, taken where nothing is compiled.
        written: a kernel of Triton's for the same, where what Inductor makes is slow. It gets the
            tensors, `static`, and the dtype that `results_in` says or None; and is taken on CUDA
            wherever it runs, in evaluation, too: it is made once for all shapes.
    """
    if written is not None and (made := _by_hand(written, tensors, static)) is not None:
        return made
    kernel = _kernel(function, tensors, static) if _gains(tensors[0]) else None
    if kernel is not None:
        result: Tensor = kernel(*tensors)
        return result
    return function(*tensors, *static) if otherwise is None else otherwise()


def _by_hand(
    written: Callable[..., Tensor], tensors: tuple[Tensor, ...], static: tuple[Any, ...]
) -> Tensor | None:
    """Return what a kernel of Triton's makes; None off CUDA, and where it cannot be made."""
    import torch

    device = tensors[0].device
    if device.type != "cuda" or not has_triton() or (written, device) in _refused:
        return None
    try:
        return written(*tensors, *static, _dtype())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, its compiler or the driver say
        _refused.add((written, device))
        _tell(written, error)
        return None


def _gains(packed: Tensor) -> bool:
    return packed.is_cuda and packed.nbytes >= LEAST_BYTES


def _kernel(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], static: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """Return the kernel, made now if kernels are; what training has compiled is there afterwards,
    too."""
    key = (function, static, _dtype(), tensors[0].device, *[(t.shape, t.dtype) for t in tensors])
    if _active and key not in _kernels:
        _kernels[key] = _compile(function, tensors, static, _dtype())
    return _kernels.get(key)


def _compile(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    static: tuple[Any, ...],
    dtype: torch.dtype | None = None,
) -> Callable[..., Any] | None:
    """Return the kernel, or None where there is no compiler, or it does not know an operation."""
    import torch

    try:
        from torch._inductor.compile_fx import compile_fx_inner  # torch.compile's, without guards

        # As in eager mode, intermediate results are rounded to their dtype.
        rounded = torch._inductor.config.patch(emulate_precision_casts=True)
        with torch.no_grad(), rounded:
            kernel: Any = compile_fx_inner(traced(function, tensors, static, dtype), [*tensors])
            kernel([*tensors])
    except Exception as error:
        _tell(function, error)
        return None
    return lambda *given: kernel([*given])[0]


def _tell(function: Callable[..., Any], error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"{function.__name__} runs uncompiled, which is slower: {reason}"
    warn(what, SlowerWarning, stacklevel=3)


def traced(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    static: tuple[Any, ...],
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the operations of function(*tensors, *static) as a module that returns a tuple, and
    those of `results_in` where there is a `dtype`; computes nothing."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*given: Tensor) -> tuple[Tensor]:
        result = function(*given, *static)
        return (result if dtype is None else result.to(dtype).contiguous(),)

    operations = make_fx(
        functionalize(run),
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,  # constants, such as a table of shifts
    )
    return operations(*tensors)
