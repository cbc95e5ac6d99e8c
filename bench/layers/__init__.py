"""The fused training layers against eager torch and torch.compile: python -m bench.layers."""
