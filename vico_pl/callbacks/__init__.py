"""What goes along with a run: it records, guards, saves and stops, and changes no weight."""
