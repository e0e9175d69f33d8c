"""Text to score. The only floor that knows transformers."""
