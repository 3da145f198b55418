"""A run or an export as one page that a browser shows, made from what was recorded: nothing is computed again."""
