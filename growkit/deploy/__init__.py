"""From an nn.Module to a served file that is proven: export, parity, latency, data sets."""
