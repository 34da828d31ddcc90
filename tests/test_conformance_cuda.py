"""The conformance suite on a GPU, in bfloat16: `pytest -m cuda`."""

# ruff: noqa: RUF012 (options are given as a plain dict)

import pytest

from quantadapt.testing import BackendSuite

pytestmark = pytest.mark.cuda


class OnGPU(BackendSuite):
    device = "cuda"
    dtype = "bfloat16"


class TestNone(OnGPU):
    backend = "none"


class TestHQQ(OnGPU):
    backend = "hqq"
    options = {"bits": 4}


class TestNF4(OnGPU):
    backend = "bnb-nf4"


class TestFP4(OnGPU):
    backend = "bnb-fp4"


class TestInt8(OnGPU):
    backend = "bnb-int8"


class TestTorchAOInt8(OnGPU):
    backend = "torchao-int8"


class TestTorchAOInt4(OnGPU):
    backend = "torchao-int4"


class TestTorchAOInt4Unpacked(OnGPU):
    backend = "torchao-int4"
    options = {"layout": "unpacked"}
    adapters = ("lora",)


class TestTorchAOIntx(OnGPU):
    backend = "torchao-intx"
    options = {"bits": 3}


class TestTorchAOFloat8(OnGPU):
    backend = "torchao-fp8"


class TestINC(OnGPU):
    backend = "inc"


class TestMXFP4(OnGPU):
    backend = "mxfp4"


class TestNVFP4(OnGPU):
    backend = "nvfp4"


class TestHQQOtherAdapters(OnGPU):
    backend = "hqq"
    adapters = ("rslora", "pissa", "boft", "hra", "loha", "lokr", "miss", "oft", "road", "shira")
