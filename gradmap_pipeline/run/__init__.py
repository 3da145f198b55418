"""Plans that are run, and what is kept of them."""
