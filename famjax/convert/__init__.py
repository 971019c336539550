"""Hugging Face directories in and out: the families of open decoders, and their tensors."""
