"""From an nn.Module to a verified file that can be served: export, parity, latency, data sets."""
