"""The labelled journal: entries, and questions with the entries that answer them."""
