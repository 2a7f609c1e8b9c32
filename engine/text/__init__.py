"""Between ids and text: what a vocabulary has, and the text of a choice as its tokens come."""
