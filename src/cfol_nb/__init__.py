"""How robust is the class that is worst off? Class-wise robust accuracy, and training that lifts the worst class."""

__version__ = "0.1.0"
