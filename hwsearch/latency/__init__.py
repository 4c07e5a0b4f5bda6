"""The latency model: terms, regression, what it does not know."""
