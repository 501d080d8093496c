"""Published models in and out: Hugging Face folders, GGUF files, PEFT adapters."""
