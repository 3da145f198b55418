"""What a stage is, and what stages share."""
