"""What is generated from: prompts, data sets, published numbers and synthetic models."""
