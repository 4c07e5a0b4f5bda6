"""What of this machine and its runtimes works."""
