"""What a run will take, before it begins: memory, operations, time; and whether a machine is fit for it."""
