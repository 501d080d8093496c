"""The parts of the transformer: attention, rotary positions, the KV cache."""
