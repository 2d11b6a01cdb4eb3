"""Training loops: torch only, no Ray. A shared base (sampling, steps, schedule, checkpoints, loop) and one module per trainer."""
