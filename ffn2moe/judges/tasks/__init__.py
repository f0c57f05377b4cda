"""Kinds of questions, one file each; no file imports torch."""
