"""How answers are shown: text for terminals, pictures."""
