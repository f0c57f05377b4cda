"""The dense side: model families, their FFNs, and how a teacher is found, probed and loaded."""
