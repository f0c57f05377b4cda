"""Native Hugging Face mixture architectures that hold a decomposed model."""
