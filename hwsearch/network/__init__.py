"""The network as plain data: units, edges, variants, widths, memory. Neither torch nor a runtime."""
