"""What `pytest --pyargs quantadapt.testing --backend NAME` collects."""

from quantadapt.testing import BackendSuite


class TestBackend(BackendSuite):
    """Stands for the suite of each `--backend`; the pytest plugin puts those in its place."""

    __test__ = False
