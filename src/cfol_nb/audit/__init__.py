"""Audit: how robust is each class of any model, how sure is that, what attacks it, and can the numbers be trusted?"""

from cfol_nb.audit.compare import Comparison, compare, outcomes_of
from cfol_nb.audit.core import audit, read_attributes
from cfol_nb.audit.foreign import load, load_model, settings, unseen
from cfol_nb.audit.result import Audit
from cfol_nb.audit.weights import load_weights

__all__ = [
    "Audit",
    "Comparison",
    "audit",
    "compare",
    "load",
    "load_model",
    "load_weights",
    "outcomes_of",
    "read_attributes",
    "settings",
    "unseen",
]
