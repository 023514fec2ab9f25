"""mtfast: one BERT, three tasks, packed steps."""

__version__ = "0.1.0"
