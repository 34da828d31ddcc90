"""GGUF, the format of llama.cpp and of what is built on it: whole models, and LoRA adapters."""
