"""All parts of the suite together."""

from __future__ import annotations

from .adapter_suite import AdapterSuite
from .refusal_suite import RefusalSuite
from .target_suite import TargetSuite


class BackendSuite(TargetSuite, AdapterSuite, RefusalSuite):
    """Everything: subclass it, name the backend."""
