"""What a run would take, from one layer tried on this machine."""
