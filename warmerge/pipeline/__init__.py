"""One command each; they do not import each other."""
