"""Training and evaluation of any model: objects in, numbers and files out."""
