"""The mixture of experts: weights cut into experts, the router, the layer and its checkpoint."""
