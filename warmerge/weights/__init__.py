"""Tensors on disk. This floor never imports transformers and never sees text."""
