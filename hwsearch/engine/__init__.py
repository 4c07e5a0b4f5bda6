"""Built networks: set up for a backend, what each executed, whether it computes what was promised."""
