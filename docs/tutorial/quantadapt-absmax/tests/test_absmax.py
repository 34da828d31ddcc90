"""Everything that quantadapt asks of a backend, asked of absmax."""

from typing import ClassVar

from quantadapt.testing import BackendSuite, TargetSuite


class TestAbsmax(BackendSuite):
    backend = "absmax"


class TestAbsmaxInGroups(TargetSuite):
    backend = "absmax"
    options: ClassVar = {"group_size": 64}
