"""What a model answers, and how answers are judged."""
