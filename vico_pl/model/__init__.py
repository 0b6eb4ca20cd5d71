"""What computes: tiles -> patch features -> vision tokens -> response hidden states."""
