"""Distillation of a student from its teacher, end to end and layer by layer."""
