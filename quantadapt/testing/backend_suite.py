"""All parts of the suite together."""

from __future__ import annotations

from .adapter_suite import AdapterSuite
from .experts_suite import ExpertsSuite
from .refusal_suite import RefusalSuite
from .target_suite import TargetSuite


class BackendSuite(TargetSuite, ExpertsSuite, AdapterSuite, RefusalSuite):
    """Everything: subclass it, name the backend."""
