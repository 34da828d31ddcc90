"""gptqmodel itself, imported and run without leftovers; import this module before gptqmodel's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from quantadapt.dependencies import unchanged_process

NO_EXTENSION = "GPTQMODEL_DISABLE_GPTQ_CUDA"

# It names other folders of the Hugging Face cache, an order of GPUs and settings of CUDA's
# allocator in the environment, silences warnings, and has the root logger print everything.
with unchanged_process():
    import_module("gptqmodel")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep gptqmodel's log off the screen, and its CUDA extension, which it would compile, out."""
    from gptqmodel.utils.logger import setup_logger

    log, before = setup_logger(), os.environ.get(NO_EXTENSION)
    level = log.level
    log.setLevel("ERROR")
    os.environ[NO_EXTENSION] = "1"
    try:
        yield
    finally:
        log.setLevel(level)
        del os.environ[NO_EXTENSION]
        os.environ |= {} if before is None else {NO_EXTENSION: before}
