"""Re-parameterized blocks, the LightNet family, and surgery on stock models."""
