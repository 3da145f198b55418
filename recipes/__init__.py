"""The recipes that ship, as data: `gradmap recipes` lists and prints them."""
