"""What is measured on, and how anything is timed: fingerprints, locks, clocks, energy, load, timing."""
