"""Calibration, baselines, metrics and the report."""
