"""Components of the transformer: attention, rotary position embeddings, KV cache."""
