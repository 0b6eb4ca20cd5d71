"""Losses and labels: pure tensor functions."""
