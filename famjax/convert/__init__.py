"""Hugging Face models and PEFT adapters in and out: families of open decoders, and tensors."""
