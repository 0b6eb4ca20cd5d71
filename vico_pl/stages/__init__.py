"""LightningModules that conduct: one per stage of training."""
