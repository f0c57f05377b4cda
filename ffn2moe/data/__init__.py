"""Texts and token sequences: corpora, generated text, batches and embeddings."""
