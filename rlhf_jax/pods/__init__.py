"""What a stage would take on a TPU pod: memory, arithmetic, traffic, time and money, from programs compiled for it."""
