"""Write an export: trace a graph, lower it to plans, prove parity with PyTorch."""
