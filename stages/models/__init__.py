"""Model families in ttnn's vocabulary."""
