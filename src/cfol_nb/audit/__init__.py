"""Audit: how robust is each class of any model, how sure is that, what attacks it, and can the numbers be trusted?"""

from cfol_nb.audit.core import audit
from cfol_nb.audit.foreign import Loaded, load, load_model, middle, own_transform, settings, unseen
from cfol_nb.audit.look import first_look, match, outputs_of, read_classes
from cfol_nb.audit.result import Audit
from cfol_nb.audit.weights import load_weights

__all__ = [
    "Audit",
    "Loaded",
    "audit",
    "first_look",
    "load",
    "load_model",
    "load_weights",
    "match",
    "middle",
    "outputs_of",
    "own_transform",
    "read_classes",
    "settings",
    "unseen",
]
