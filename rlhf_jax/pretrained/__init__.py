"""Import and export of published models: Hugging Face folders, GGUF files, PEFT adapters."""
