"""From budgets to a file that meets them as measured."""
