"""The bench of the stream worker: ``python -m bench``. It measures; nothing of the product imports it."""
