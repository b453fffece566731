"""Audit: how robust is each class of any model, how sure is that, what attacks it, and can the numbers be trusted?"""

from cfol_nb.audit import blackbox
from cfol_nb.audit.blackbox import black_box
from cfol_nb.audit.compare import Comparison, compare, outcomes_of
from cfol_nb.audit.core import audit, read_attributes
from cfol_nb.audit.foreign import Loaded, load, load_model, middle, own_transform, settings, unseen
from cfol_nb.audit.look import first_look, match, outputs_of, read_classes
from cfol_nb.audit.result import Audit
from cfol_nb.audit.weights import load_weights

__all__ = [
    "Audit",
    "Comparison",
    "Loaded",
    "audit",
    "black_box",
    "blackbox",
    "compare",
    "first_look",
    "load",
    "load_model",
    "load_weights",
    "match",
    "middle",
    "outcomes_of",
    "outputs_of",
    "own_transform",
    "read_attributes",
    "read_classes",
    "settings",
    "unseen",
]
