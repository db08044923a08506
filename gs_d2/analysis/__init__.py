"""What a config's detector costs and what it is trained on, counted without training it."""
