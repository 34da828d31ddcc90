"""Every built-in backend under the conformance suite: the compatibility matrix, verified."""

# ruff: noqa: RUF012 (options are given as a plain dict)

from quantadapt.testing import AdapterSuite, BackendSuite, RefusalSuite, TargetSuite


class TestNone(BackendSuite):
    backend = "none"


class TestHQQ(BackendSuite):
    backend = "hqq"
    options = {"bits": 4}


class TestNF4(BackendSuite):
    backend = "bnb-nf4"


class TestFP4(BackendSuite):
    backend = "bnb-fp4"
    adapters = ("lora", "dora")  # NF4 with another table


class TestInt8(BackendSuite):
    backend = "bnb-int8"


class TestTorchAOInt8(BackendSuite):
    backend = "torchao-int8"


class TestTorchAOInt4(BackendSuite):
    backend = "torchao-int4"


class TestTorchAOIntx(BackendSuite):
    backend = "torchao-intx"
    options = {"bits": 3}


class TestTorchAOFloat8(BackendSuite):
    backend = "torchao-fp8"


class TestMXFP4(BackendSuite):
    backend = "mxfp4"


class TestNVFP4(BackendSuite):
    backend = "nvfp4"


class TestHQQ1(TargetSuite):
    backend = "hqq"
    options = {"bits": 1, "group_size": 32}


class TestHQQ2(TargetSuite):
    backend = "hqq"
    options = {"bits": 2}


class TestHQQ3(TargetSuite, AdapterSuite, RefusalSuite):
    backend = "hqq"
    options = {"bits": 3}
    adapters = ("lora",)


class TestHQQ8(TargetSuite):
    backend = "hqq"
    options = {"bits": 8}


class TestHQQ3Axis0(TargetSuite):
    backend = "hqq"
    options = {"bits": 3, "axis": 0}


class TestHQQ4Axis0(TargetSuite):
    backend = "hqq"
    options = {"bits": 4, "axis": 0}


class TestNF4SingleQuant(TargetSuite):
    backend = "bnb-nf4"
    options = {"double_quant": False, "quant_storage": "bfloat16"}
