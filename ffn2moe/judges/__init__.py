"""Judge language models by questions with several answers, and by text. This package itself imports no torch."""
