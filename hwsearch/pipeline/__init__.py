"""What `run` does, stage by stage: how its time is shared out, the closed loop, training of the answer, several runtimes."""
