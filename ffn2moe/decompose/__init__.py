"""From a dense FFN to a routed mixture: statistics, partition, oracle, router and closed-form fits."""
