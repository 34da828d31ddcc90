"""Answers are scored by functions of the user: found by name, called with a time limit, checked."""
