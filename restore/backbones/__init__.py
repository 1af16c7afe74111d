"""Networks that predict eps."""
