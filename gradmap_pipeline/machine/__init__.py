"""What this computer is, and what happens on it: memory, files, folders made whole, processes, environments."""
