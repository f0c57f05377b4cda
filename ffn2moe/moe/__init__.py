"""The mixture of experts: weights sliced into experts, the router, the layer and its checkpoint."""
