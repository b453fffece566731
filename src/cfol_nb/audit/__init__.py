"""Audit: how robust is each class of any model, how sure is that, what attacks it, and can the numbers be trusted?"""

from cfol_nb.audit.core import audit
from cfol_nb.audit.foreign import load_model, load_weights, settings, unseen
from cfol_nb.audit.result import Audit

__all__ = ["Audit", "audit", "load_model", "load_weights", "settings", "unseen"]
