"""The dense model: families, FFNs, and how to locate, probe and load them."""
