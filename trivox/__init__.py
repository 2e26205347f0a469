"""What the commands at the top are made of, a room each; the docstring of each says what it knows."""
