"""Every op in a few lines of plain PyTorch: the definition that all backends are tested against."""
