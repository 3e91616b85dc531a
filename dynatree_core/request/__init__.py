"""What a caller asks of one generation, read and checked before anything runs."""
