"""How long a test waits for what must come: far more than it takes anywhere; what ends at it hangs."""

PATIENCE = 1800  # seconds
