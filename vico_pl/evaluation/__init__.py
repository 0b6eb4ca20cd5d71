"""What is claimed: arms, metrics and the report."""
