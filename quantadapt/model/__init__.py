"""What a model is made of: its linear layers and blocks, its head and loss."""
